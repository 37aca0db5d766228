"""A settings parser whose answer to a mistake is one line: the setting, its value, what was expected."""

import re
import sys
from collections.abc import Iterable
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import jsonargparse
from jsonargparse.typing import register_type
from rapidfuzz import fuzz

# Texts under the fields of a dataclass are their help; ~ in a path is the home folder, also inside YAML.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
register_type(Path, deserializer=lambda text: Path(text).expanduser(), type_check=isinstance)

Config = TypeVar("Config")
SIMILAR = 70  # of 100: less alike than this, a name is unknown rather than misspelt
WRONG_VALUE = re.compile(r'Parser key "([\w.]+)":.*(?:Got|Given) value: (.*)', re.DOTALL)
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


class SettingsParser(jsonargparse.ArgumentParser):
    """Takes dataclasses of settings as flags; unknown names are refused with the closest known one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.types: dict[str, Any] = {}  # dotted name -> type of each setting

    def add_settings(self, config: type, section: str = "") -> None:
        """Take every field of a dataclass as --section.field."""
        self.add_class_arguments(config, section or None)
        self.types |= types_of(config, section)

    def read(self, argv: list[str]) -> jsonargparse.Namespace:
        """Return the instantiated settings of a command line; exit with one line on a mistake."""
        for word in argv:
            if word.startswith("--"):
                self.require_known(word[2:].split("=")[0].rstrip("+"))
        try:
            return self.instantiate(self.parse_args(argv))
        except ValueError as error:  # settings that contradict each other
            sys.exit(f"error: {error}")

    def read_as(self, config: type[Config], argv: list[str]) -> Config:
        """Return one dataclass of settings, whose fields are the flags."""
        self.add_settings(config)
        values = self.read(argv)
        try:
            return config(**vars(values))
        except ValueError as error:
            sys.exit(f"error: {error}")

    def require_known(self, name: str, file: str | None = None) -> None:
        """Exit, naming the closest setting, unless there is one of this name; `file` is where it was found."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--") and not flag.endswith("+")]
        known = [flag.removeprefix("--") for flag in flags]
        if name in known:
            return
        start, dashes = (f"{file}: ", "") if file else ("", "--")
        if close := closest(name, known):
            sys.exit(f"error: {start}unknown setting {dashes}{name}: did you mean {dashes}{close}?")
        section = name.rpartition(".")[0]
        inside = [other for other in known if other.startswith(f"{section}.")] or [k for k in known if "." not in k]
        sys.exit(f"error: {start}unknown setting {dashes}{name}; known: {', '.join(inside)}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with one line instead of a page of usage."""
        if not self.exit_on_error:
            super().error(message, ex)
        if (found := WRONG_VALUE.search(message)) and found[1] in self.types:
            name, value = found.groups()
            message = f"--{name} {value}: expected {expected(self.types[name], self.get_defaults()[name])}"
        message = message.replace("arguments are required: ", "settings are required: --")
        sys.exit(f"error: {' '.join(message.split())}")


def types_of(config: type, section: str) -> dict[str, Any]:
    """Return the type of every field of a dataclass by its dotted name, those of nested ones included."""
    types: dict[str, Any] = {}
    for field, kind in get_type_hints(config).items():
        name = f"{section}.{field}".lstrip(".")
        types |= types_of(kind, name) if isinstance(kind, type) and is_dataclass(kind) else {name: kind}
    return types


def expected(kind: Any, default: Any) -> str:
    """Return in words which values a type takes; `default` is shown as the example of a list."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (list, tuple):
        return f"a list such as [{','.join(map(str, default or 'ab'))}]"
    if NoneType in get_args(kind):
        return " or ".join("null" if k is NoneType else expected(k, default) for k in get_args(kind))
    return EXPECTED.get(kind, str(kind))


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the setting that a wrong name most likely means: its last word decides, and then its section."""

    def likeness(other: str) -> tuple[float, float, float]:
        (section, _, word), (other_section, _, other_word) = name.rpartition("."), other.rpartition(".")
        return fuzz.ratio(word, other_word), fuzz.ratio(section, other_section), -len(other)

    known = list(known)
    section = name.rpartition(".")[0]
    inside = [other for other in known if other.rpartition(".")[0] == section]
    best = max(known, key=likeness)
    if likeness(best)[0] < 100 and section and inside:
        best = max(inside, key=likeness)
    return best if likeness(best)[0] >= SIMILAR else None
