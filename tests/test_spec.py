"""What a spec with a moved letter means, and what is refused: strings and integers, no arrays."""

import itertools
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collective_matmul.spec import Spec, nearest_multiples, sizes_of


@st.composite
def specs(draw):
    """Two operands and a result, each letter where an einsum of ours may have it."""
    letters = draw(st.permutations(string.ascii_letters))
    counts = [draw(st.integers(0, 2)) for _ in range(4)]
    batch, contracted, left, right = (
        "".join(letters[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(4)
    )
    lhs, rhs, out = (
        "".join(draw(st.permutations(text)))
        for text in (batch + contracted + left, batch + contracted + right, batch + left + right)
    )
    return lhs, rhs, out, {"batch": batch, "contracted": contracted, "free": left + right}


@given(specs())
def test_a_spec_reads_back(parts):
    lhs, rhs, out, roles = parts
    text = f"{lhs},{rhs}->{out}"
    spec = Spec.parse(text)
    assert (spec.lhs, spec.rhs, spec.out) == (lhs, rhs, out)
    assert str(spec) == text
    assert Spec.parse(" ".join(text).replace("- >", "->")) == spec
    for role, letters in roles.items():
        assert all(spec.role(letter) == role for letter in letters)


@given(specs())
def test_swapping_exchanges_the_operands_and_no_role(parts):
    lhs, rhs, out, roles = parts
    spec = Spec.parse(f"{lhs},{rhs}->{out}").swapped()
    assert spec == Spec.parse(f"{rhs},{lhs}->{out}")
    assert all(spec.role(letter) == role for role in roles for letter in roles[role])


@given(specs(), st.data(), st.integers(1, 6))
def test_sizes_are_those_of_the_whole(parts, data, t):
    lhs, rhs, _, _ = parts
    spec = Spec.parse(f"{lhs},{rhs}->{parts[2]}")
    sizes = {x: data.draw(st.integers(1, 9)) for x in sorted(set(lhs + rhs))}
    sharded = data.draw(st.sampled_from(sorted(lhs))) if lhs else ""
    if sharded:
        sizes[sharded] *= t
    shape = tuple(sizes[x] // t if x == sharded else sizes[x] for x in lhs)
    assert sizes_of(spec, shape, tuple(sizes[x] for x in rhs), sharded=sharded, t=t) == sizes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mk,kn", "'mk,kn' 'mk,kn->mn'"),  # no result
        ("mk->mk", "'mk->mk' two operands"),
        ("mk,kn,no->mo", "two operands"),
        ("", "two operands"),
        ("...k,kn->...n", "lhs letter '...'"),
        ("mk,k...->m...", "rhs letter '...'"),
        ("m1,1n->mn", "lhs letters"),
        ("mm,mn->mn", "'m' twice lhs diagonal"),
        ("mk,kk->mk", "'k' twice rhs diagonal"),
        ("mk,kn->mm", "'m' twice result"),
        ("mk,kn->mz", "'z' result operand"),
        ("mkj,kn->mn", "'j' lhs sum"),
        ("mk,kjn->mn", "'j' rhs sum"),
        (3, "string 3"),
        (None, "string None"),
    ],
)
def test_what_is_no_spec_is_refused_with_the_remedy(text, words):
    with pytest.raises(ValueError) as caught:
        Spec.parse(text)
    missing = [word for word in words.split() if word not in str(caught.value)]
    assert not missing, f"{caught.value} lacks {missing}"


def test_one_letter_of_one_operand_may_be_summed_nowhere():
    """An einsum would sum it silently; the message must say which and what to do."""
    for text, letter in (("abk,kn->an", "b"), ("mk,knq->mn", "q")):
        with pytest.raises(ValueError, match=f"'{letter}'.*sum over it before"):
            Spec.parse(text)


@given(st.integers(0, 1000), st.integers(1, 64))
def test_the_nearest_multiples_are_the_nearest(size, t):
    if size % t == 0:
        return
    named = [int(word) for word in nearest_multiples(size, t).split(" or ")]
    assert named == [x for x in range(t, size + t + 1, t) if abs(x - size) < t]


def test_sizes_that_contradict_are_named():
    spec = Spec.parse("mk,kn->mn")
    with pytest.raises(ValueError, match=r"'mk,kn->mn'.*'k'.*4.*\(6, 4\).*3.*\(3, 5\)"):
        sizes_of(spec, (6, 4), (3, 5))
    with pytest.raises(ValueError, match=r"2 letters.*'mk'.*3 dimensions.*\(6, 4, 2\)"):
        sizes_of(spec, (6, 4, 2), (4, 5))
    with pytest.raises(
        ValueError, match=r"4 of letter 'k' on each of 3 devices, 12 in all.* has 4"
    ):
        sizes_of(spec, (6, 4), (4, 5), sharded="k", t=3)


def test_roles_agree_with_numpy():
    """A contracted letter is one that the result of numpy's einsum has lost."""
    for lhs, rhs in itertools.product(("bmk", "kmb"), ("bkn", "nkb")):
        spec = Spec.parse(f"{lhs},{rhs}->bmn")
        shape = np.einsum(str(spec), np.ones((2, 2, 2)), np.ones((2, 2, 2))).shape
        assert len(shape) == len(spec.out)
        assert [spec.role(x) for x in "bmkn"] == ["batch", "free", "contracted", "free"]
