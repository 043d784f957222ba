"""Values that stand for what only one side of a branch has, or that only some of the inputs have."""

from __future__ import annotations

from typing import Any

from sparse_onnx.core.errors import ImpossibleError

#: File, line, and the line's text.
Place = tuple[str, int, str]
_PLACE = "_sparse_onnx_place"


def written(place: Place) -> str:
    return f"{place[0]}:{place[1]}: `{place[2]}`"


def refuse(place: Place, reason: str, hint: str) -> ImpossibleError:
    """An error that names the user's line."""
    error = ImpossibleError(f"{written(place)} {reason}", hint)
    setattr(error, _PLACE, place)
    return error


def names_a_line(error: ImpossibleError) -> bool:
    """Whether it says which line of the user's cannot be lifted."""
    return hasattr(error, _PLACE)


def _raising(name: str) -> Any:
    def raises(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise self._error()

    raises.__name__ = name
    return raises


class Undefined:
    """A variable that is another thing on each side of a branch. Any use of it is refused."""

    def __init__(self, name: str, place: Place, reason: str = "") -> None:
        self.__dict__.update(name=name, place=place, reason=reason)

    def _error(self) -> ImpossibleError:
        name, reason = self.__dict__["name"], self.__dict__["reason"]
        own = name.startswith("__sparse_result")
        what = "gives two results" if own else f"leaves '{name}' in two ways"
        return refuse(
            self.__dict__["place"],
            f"depends on tensor values and {what} that cannot be one value{reason and ': '}{reason}",
            f"give {'' if own else repr(name) + ' '}tensors of one shape and type on both sides, "
            "or write an adapter (--adapter)",
        )


for _name in [
    "__getattr__",
    "__setattr__",
    "__call__",
    "__bool__",
    "__len__",
    "__iter__",
    "__getitem__",
    "__setitem__",
    "__contains__",
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__add__",
    "__radd__",
    "__iadd__",
    "__sub__",
    "__rsub__",
    "__isub__",
    "__mul__",
    "__rmul__",
    "__imul__",
    "__truediv__",
    "__rtruediv__",
    "__itruediv__",
    "__floordiv__",
    "__rfloordiv__",
    "__mod__",
    "__rmod__",
    "__pow__",
    "__matmul__",
    "__rmatmul__",
    "__and__",
    "__or__",
    "__xor__",
    "__invert__",
    "__neg__",
    "__index__",
    "__int__",
    "__float__",
    "__str__",
    "__format__",
    "__hash__",
    "__torch_function__",
]:
    setattr(Undefined, _name, _raising(_name))


class SomeItems(list):  # type: ignore[type-arg]
    """A list whose items a branch may have appended. Those that were appended for nothing are empty tensors:
    a concatenation along their empty axis is right with them; all else is refused."""

    place: Place | None = None

    def __init__(self, *items: Any) -> None:
        super().__init__(*items)
        #: Of each item that may be missing: its position, and the condition under which it is.
        self.missing: list[tuple[int, Any, bool]] = []
        #: The conditions themselves, and under which truth the item is missing.
        self.conditions: dict[int, list[tuple[Any, bool]]] = {}

    def turns(self) -> list[tuple[list[tuple[Any, bool]], Any]]:
        """Each item, and under which truths of which conditions it is missing."""
        return [(self.conditions.get(at, []), item) for at, item in enumerate(list.copy(self))]

    @staticmethod
    def side_by_side(lists: tuple[Any, ...]) -> SomeItems | None:
        """`zip` of lists that have the same items missing, and of no others."""
        known = [each for each in lists if isinstance(each, SomeItems) and each.place is not None]
        first = known[0] if known else None
        if first is None or len(known) != len(lists) or any(type(each) is not SomeItems for each in known):
            return None
        sizes = {list.__len__(each) for each in known}
        if len(sizes) != 1 or any(not _alike(each.missing, first.missing) for each in known):
            return None
        made = SomeItems(zip(*(list.copy(each) for each in known), strict=True))
        made.place, made.missing, made.conditions = first.place, list(first.missing), dict(first.conditions)
        return made

    def surely_some(self) -> bool:
        """Whether at least one item is there for every input."""
        return list.__len__(self) > len({position for position, *_ in self.missing})

    def _error(self) -> ImpossibleError:
        assert self.place is not None
        return refuse(
            self.place,
            "depends on tensor values and decides how many items a list has",
            "concatenate the list along its first axis, or write an adapter (--adapter)",
        )


def _alike(left: list[tuple[int, Any, bool]], right: list[tuple[int, Any, bool]]) -> bool:
    return len(left) == len(right) and all(a == b for a, b in zip(left, right, strict=True))


def _guarded(name: str) -> Any:
    plain = getattr(list, name)

    def method(self: SomeItems, *args: Any, **kwargs: Any) -> Any:
        for each in (self, *args):  # of two such lists Python asks the left one, as in `[] == outs`
            if isinstance(each, SomeItems) and each.place is not None:
                raise each._error()
        return plain(self, *args, **kwargs)

    method.__name__ = name
    return method


for _name in [
    "__len__",
    "__iter__",
    "__getitem__",
    "__setitem__",
    "__delitem__",
    "__contains__",
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__add__",
    "__iadd__",
    "__mul__",
    "__rmul__",
    "__imul__",
    "__reversed__",
    "copy",
    "count",
    "index",
    "insert",
    "pop",
    "remove",
    "reverse",
    "sort",
]:
    setattr(SomeItems, _name, _guarded(_name))


def _bool(self: SomeItems) -> bool:
    return self.surely_some() or len(self) > 0


def _radd(self: SomeItems, other: Any) -> Any:
    return other + list(self)


SomeItems.__bool__ = _bool  # type: ignore[attr-defined]
SomeItems.__radd__ = _radd  # type: ignore[attr-defined]
SomeItems.__hash__ = None  # type: ignore[assignment]


class Count:
    """`len` of such a list: good for asking whether it is 0."""

    def __init__(self, items: SomeItems) -> None:
        self.items = items

    def _refused(self, *args: Any) -> Any:
        raise self.items._error()

    __index__ = __int__ = __float__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refused
    __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __lt__ = __le__ = __hash__ = __str__ = (
        __format__
    ) = _refused

    def __gt__(self, other: Any) -> Any:
        return self.items if type(other) is int and other == 0 else self._refused()

    def __ge__(self, other: Any) -> Any:
        return self.items if type(other) is int and other == 1 else self._refused()

    def __ne__(self, other: Any) -> Any:
        return self.items if type(other) is int and other == 0 else self._refused()

    def __eq__(self, other: Any) -> Any:
        return Negated(self.items) if type(other) is int and other == 0 else self._refused()

    def __bool__(self) -> bool:
        return bool(self.items)


class Negated:
    """`not items`."""

    def __init__(self, items: SomeItems) -> None:
        self.items = items

    def __bool__(self) -> bool:
        return not self.items

    def _refused(self, *args: Any) -> Any:
        raise self.items._error()

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refused  # type: ignore[assignment]
    __index__ = __int__ = __float__ = __str__ = __format__ = _refused
