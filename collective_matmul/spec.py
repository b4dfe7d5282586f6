"""What an einsum spec means when one of its letters lies in shards along a mesh axis.

Ground floor: strings and integers only. Every message names the spec, the numbers and the remedy.
"""

from __future__ import annotations

import dataclasses

FORM = "write two operands and a result, such as 'mk,kn->mn'"


@dataclasses.dataclass(frozen=True)
class Spec:
    """One two-operand einsum, `lhs,rhs->out`, a string of letters each.

    `rhs=None` stands for the absent second operand of a bare collective: the "product" is then
    the first operand itself.
    """

    lhs: str
    rhs: str | None
    out: str

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Reads `"mk,kn->mn"`.

        Raises:
          ValueError: on anything but two operands of distinct letters and an explicit result.
        """
        if not isinstance(text, str):
            raise ValueError(f"an einsum spec is a string; got {text!r}: {FORM}")
        inputs, arrow, out = text.replace(" ", "").partition("->")
        operands = inputs.split(",")
        if not arrow or len(operands) != 2:
            raise ValueError(f"cannot read the einsum spec {text!r}: {FORM}")
        spec = cls(operands[0], operands[1], out)
        spec._check(text)
        return spec

    def _check(self, text: str) -> None:
        rhs = self.rhs or ""
        for name, letters in (("lhs", self.lhs), ("rhs", rhs), ("the result", self.out)):
            if not letters.isalpha() and letters:
                raise ValueError(
                    f"{name} of {text!r} holds something else than letters; give each dimension "
                    "a letter of its own instead of '...'"
                )
            twice = sorted({letter for letter in letters if letters.count(letter) > 1})
            if twice:
                raise ValueError(
                    f"letter {twice[0]!r} stands twice in {name} of {text!r}; take the diagonal "
                    "before the call"
                )
        unknown = sorted(set(self.out) - set(self.lhs) - set(rhs))
        if unknown:
            raise ValueError(f"letter {unknown[0]!r} of the result of {text!r} is in no operand")
        for name, own, other in (("lhs", self.lhs, rhs), ("rhs", rhs, self.lhs)):
            alone = sorted(set(own) - set(other) - set(self.out))
            if alone:
                raise ValueError(
                    f"letter {alone[0]!r} of {name} in {text!r} is neither in the other operand "
                    "nor in the result; sum over it before the call"
                )

    def __str__(self) -> str:
        inputs = self.lhs if self.rhs is None else f"{self.lhs},{self.rhs}"
        return f"{inputs}->{self.out}"

    def swapped(self) -> Spec:
        """The same product with its operands exchanged."""
        if self.rhs is None:
            raise ValueError(f"{self} has one operand: nothing to exchange")
        return Spec(self.rhs, self.lhs, self.out)

    def role(self, letter: str) -> str:
        """`"batch"`, `"free"` (of one operand) or `"contracted"`."""
        if letter not in self.out:
            return "contracted"
        return "batch" if letter in self.lhs and letter in (self.rhs or "") else "free"


def sizes_of(
    spec: Spec,
    lhs_shape: tuple[int, ...],
    rhs_shape: tuple[int, ...] | None,
    *,
    sharded: str = "",
    side: str = "lhs",
    t: int = 1,
) -> dict[str, int]:
    """Size of every letter as the product sees it: `sharded` of `side` lies in `t` shards still.

    Raises:
      ValueError: if an operand has another rank than letters, or sizes of a letter contradict.
    """
    operands = [("lhs", spec.lhs, lhs_shape)]
    if spec.rhs is not None and rhs_shape is not None:
        operands.append(("rhs", spec.rhs, rhs_shape))
    found: dict[str, dict[str, int]] = {}
    for name, letters, shape in operands:
        if len(letters) != len(shape):
            raise ValueError(
                f"{name} of '{spec}' has {len(letters)} letters, {letters!r}, but the array has "
                f"{len(shape)} dimensions, {tuple(shape)}"
            )
        for letter, size in zip(letters, shape, strict=True):
            found.setdefault(letter, {})[name] = size
    if sharded:
        local = found[sharded][side]
        found[sharded][side] = local * t
    for letter, sizes in found.items():
        if len(set(sizes.values())) == 1:
            continue
        if letter == sharded:
            (other,) = set(sizes) - {side}
            raise ValueError(
                f"'{spec}': {side}, the gathered operand, has {local} of letter {letter!r} on each "
                f"of {t} devices, {sizes[side]} in all, but {other} has {sizes[other]}; give "
                f"{other} {sizes[side]} of it, or {side} shards of {sizes[other]}/{t}"
            )
        raise ValueError(
            f"'{spec}': letter {letter!r} is {sizes['lhs']} in lhs {tuple(lhs_shape)} and "
            f"{sizes['rhs']} in rhs {tuple(rhs_shape or ())}; the sizes of a letter must agree"
        )
    return {letter: next(iter(sizes.values())) for letter, sizes in found.items()}


def nearest_multiples(size: int, t: int) -> str:
    """The nearest sizes that divide by `t`, in words: `"8 or 12"`."""
    below = size // t * t
    return f"{below} or {below + t}" if below else f"{t}"
