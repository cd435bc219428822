"""What a person may write, and what the error says when it cannot be read."""

from dataclasses import dataclass, field
from typing import Annotated

import pytest

from shoal.protocol.errors import ConfigError, ManifestError
from shoal.protocol.tables import locate, parse_toml, read_table
from shoal.protocol.wire import Bound, Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    port: Annotated[int, Bound(0, 65_535)] = 80
    hosts: Annotated[tuple[str, ...], Bound(0, 2)] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    name: Annotated[str, Bound(1, 4)]
    mode: Annotated[str, Choice(("fast", "slow"))] = "fast"
    rate: Annotated[float, Bound(0, 1.5)] = 0.5
    large: Annotated[int, Bound(1, 1 << 20)] = 1
    on: bool = False
    path: Annotated[str | None, Bound(1, 8)] = None
    inner: Inner = field(default_factory=Inner)


def read(text: str) -> Outer:
    return read_table(Outer, parse_toml(text, ConfigError), "", text, ConfigError)


def test_defaults_stand_where_nothing_is_written() -> None:
    assert read('name = "a"') == Outer(name="a")


def test_every_kind_of_value_is_read() -> None:
    text = 'name = "a"\nmode = "slow"\nrate = 1\non = true\npath = "x"\n[inner]\nport = 1\nhosts = ["b", "c"]\n'
    inner = Inner(port=1, hosts=("b", "c"))
    assert read(text) == Outer(name="a", mode="slow", rate=1.0, on=True, path="x", inner=inner)
    assert type(read(text).rate) is float


@pytest.mark.parametrize(
    ("text", "where", "problem", "fix"),
    [
        ('name = "a"\nspeed = 1', "speed (line 2)", "no known field", "inner, large, mode, name, on, path, rate"),
        ('name = "a"\n[inner]\nprot = 1', "inner.prot (line 3)", "no known field", "hosts, port"),
        ('mode = "slow"', "name", "is missing", "add name = …"),
        ("name = 1", "name (line 1)", "is int, not str", "quoted string"),
        ('name = "a"\nrate = "1"', "rate (line 2)", "is str, not float", "number"),
        ('name = "a"\nrate = true', "rate (line 2)", "is bool, not float", "number"),
        ('name = "a"\nlarge = true', "large (line 2)", "is bool, not int", "whole number"),
        ('name = "a"\nlarge = 1.0', "large (line 2)", "is float, not int", "whole number"),
        ('name = "a"\non = 1', "on (line 2)", "is int, not bool", "true or false"),
        ('name = "a"\nmode = "s"', "mode (line 2)", "'s' is not allowed", "fast, slow"),
        ('name = "a"\nrate = 2', "rate (line 2)", "2 is out of range", "use 0 to 1.5"),
        ('name = "a"\nrate = nan', "rate (line 2)", "nan is out of range", "use 0 to 1.5"),
        ('name = "a"\nrate = inf', "rate (line 2)", "inf is out of range", "use 0 to 1.5"),
        ('name = "a"\nlarge = 5000000', "large (line 2)", "5000000 is out of range", "use 1 to 1048576"),
        ('name = "abcde"', "name (line 1)", "5 bytes is out of range", "use 1 to 4"),
        ('name = "äöü"', "name (line 1)", "6 bytes is out of range", "use 1 to 4"),
        ('name = "a"\npath = ""', "path (line 2)", "0 bytes is out of range", "use 1 to 8"),
        ('name = "a"\ninner = 1', "inner (line 2)", "is not a table", "[inner]"),
        ('name = "a"\n[inner]\nhosts = "b"', "inner.hosts (line 3)", "is not a list of strings", '["…", "…"]'),
        ('name = "a"\n[inner]\nhosts = [1]', "inner.hosts (line 3)", "is not a list of strings", '["…", "…"]'),
        ('name = "a"\n[inner]\nhosts = ["", "", ""]', "inner.hosts (line 3)", "3 entries is out of range", "0 to 2"),
    ],
)
def test_a_bad_value_names_the_field_the_line_and_the_fix(text: str, where: str, problem: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert caught.value.field == where
    assert problem in caught.value.problem
    assert fix in caught.value.fix


def test_a_missing_field_of_a_sub_table_names_its_table() -> None:
    with pytest.raises(ManifestError) as caught:
        read_table(Outer, {}, "outer", "", ManifestError)
    assert (caught.value.field, caught.value.fix) == ("outer.name", "add name = … to [outer]")


def test_broken_syntax_tells_the_line() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        parse_toml('name = "a"\nmode = slow\n', ConfigError)


def test_the_place_is_found_in_the_right_table() -> None:
    text = "port = 1  # of nothing\n\n[other]\nport = 2\n[ inner ]  # the one\n  port= 3\nport_old = 4\n"
    assert locate(text, "", "port") == "port (line 1)"
    assert locate(text, "inner", "port") == "inner.port (line 6)"
    assert locate(text, "", "inner") == "inner (line 5)"
    assert locate(text, "inner", "port_new") == "inner.port_new"
