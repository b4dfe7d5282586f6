"""The reference page, made from docstrings: heading, signature and text of each public name.

A docstring is Markdown with the sections Args, Returns, Raises and Reference. A public name without
one is an error, so the documentation cannot be built without it.
"""

import importlib
import inspect
import re

SECTIONS = ("Args", "Attributes", "Example", "Raises", "Reference", "Returns", "Yields")
LISTS = ("Args", "Attributes", "Raises")


def public(module):
    """{name: value} of what a module offers: its __all__, or the callables that it defines."""
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value)
        and getattr(value, "__module__", None) == module.__name__
        and not name.startswith("_")
    }


def docstring(value, name):
    """The docstring of a callable or a module.

    Raises:
      ValueError: if there is none. The signature that a dataclass gets for a docstring is none.
    """
    text = inspect.cleandoc(value.__doc__ or "")
    if not text or text.startswith(f"{name}("):
        raise ValueError(f"{name} is public and has no docstring")
    return text


def signature(value, name):
    """`name(x, *, layout)`, without annotations, which the text explains better."""
    if inspect.isclass(value) and issubclass(value, Exception):
        return name  # it is caught, not called
    parameters = inspect.signature(value).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return f"{name}{inspect.Signature(bare)}"


def sections(text):
    """Splits a docstring into its prose and {section: its text}."""
    found = {"": []}
    current = ""
    for line in text.splitlines():
        if line.endswith(":") and line[:-1] in SECTIONS:
            current = line[:-1]
            found[current] = []
        else:
            found[current].append(line)
    texts = {name: inspect.cleandoc("\n".join(["", *lines])) for name, lines in found.items()}
    return texts.pop("").strip(), texts


def entries(text):
    """{names: text} of an Args or Raises section; an entry is `name: text` or `a, b: text`."""
    found, current = {}, None
    for line in text.splitlines():
        entry = re.match(r"(\*{0,2}\w[\w.]*(?:, \*{0,2}\w[\w.]*)*):\s*(.*)", line)
        if entry:
            current = entry[1].replace("*", "")
            found[current] = entry[2]
        elif current:
            found[current] += " " + line.strip()
    return found


def describe(name, value):
    """The Markdown of one public name; of a module, that of all its names."""
    prose, rest = sections(docstring(value, name))
    if inspect.ismodule(value):
        inner = public(value).items()
        return "\n".join([f"## {value.__name__}", "", prose, "", *(describe(*it) for it in inner)])
    lines = [f"### {name}", "", "```python", signature(value, name), "```", "", prose, ""]
    for section, text in rest.items():
        listed = entries(text) if section in LISTS else {}
        lines += [f"**{section}**", ""]
        lines += [f"- `{names}`: {said}" for names, said in listed.items()] or [text]
        lines.append("")
    return "\n".join(lines)


def fill_in(page):
    """Replaces {{ module }} by the description of the module: callables first, then modules."""

    def found(match):
        names = public(importlib.import_module(match[1])).items()
        ordered = sorted(names, key=lambda item: inspect.ismodule(item[1]))
        return "\n".join(describe(name, value) for name, value in ordered)

    return re.sub(r"^\{\{ ([\w.]+) \}\}$", found, page, flags=re.MULTILINE)
