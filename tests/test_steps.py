"""Work in steps: generators that are run alone, together, and one beside the other."""

import jax
import jax.numpy as jnp
import pytest

from collective_matmul.steps import beside, finish, together


def counting(log, name, n):
    """n steps, each with a value to get back; the result is what came back."""
    seen = []
    for i in range(n):
        log.append((name, i))
        seen.append((yield jnp.asarray(i)))
    return [int(x) for x in seen]


def test_finish_gives_back_what_was_yielded():
    assert finish(counting([], "a", 3)) == [0, 1, 2]
    assert finish(counting([], "a", 0)) == []


def test_together_goes_round_by_round():
    log = []
    journeys = together((counting(log, "a", 1), counting(log, "b", 3), counting(log, "c", 0)))
    assert finish(journeys) == ([0], [0, 1, 2], [])
    assert log == [("a", 0), ("b", 0), ("b", 1), ("b", 2)]
    assert finish(together(())) == ()


@pytest.mark.parametrize("products, rounds", [(3, 3), (2, 5), (4, 1), (0, 2), (2, 0)])
def test_beside_gives_each_product_a_round(products, rounds):
    log = []
    done, arrived = beside(counting(log, "product", products), counting(log, "round", rounds))
    assert (done, arrived) == ([*range(products)], [*range(rounds)])
    both = min(products, rounds)
    pairs = [x for i in range(both) for x in (("round", i), ("product", i))]
    assert log[: 2 * both] == pairs


def test_a_round_and_the_product_beside_it_end_before_the_next_begin():
    """What ties them is in the program, where the compiler cannot part them."""

    def products(x):
        for _ in range(3):
            x = yield jnp.sin(x)
        return x

    def journey(y):
        for _ in range(2):
            y = yield jnp.cos(y)
        return y

    def both(x, y):
        return beside(products(x), journey(y))

    equations = jax.make_jaxpr(both)(1.0, 2.0).eqns
    names = [str(each.primitive) for each in equations]
    tie = "optimization_barrier"
    assert names == ["cos", "sin", tie, "cos", "sin", tie, "sin"]
    first, second = (each for each in equations if str(each.primitive) == tie)
    assert len(first.invars) == len(second.invars) == 2
