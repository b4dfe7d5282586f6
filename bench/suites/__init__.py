"""What `python -m bench measure` times: pytest-benchmark suites, apart from the tests.

    operations          the products that are timed: their modes, sizes and programs
    test_operations     every algorithm on every backend, forward and with its gradient
    test_train_steps    training steps of small vision transformers by every schedule

`pytest` alone does not collect them: `testpaths` names `tests`.
"""
