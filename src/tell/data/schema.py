"""JSON Schemas ready to validate with: nothing is fetched, no reference loops, patterns have a time limit."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tell.errors import TellError
from tell.shown import brief

if TYPE_CHECKING:
    import regex
    from jsonschema import ValidationError
    from jsonschema.protocols import Validator
    from referencing._core import Resolver
    from referencing.jsonschema import Specification

    Errors = Iterator[ValidationError]

SECONDS = 1.0
"""Longest search for one pattern in one string; backtracking can take exponential time."""
FIX_SCHEMA = "Fix the JSON Schema given with --schema."
STRIKES = 3
"""Timed-out searches after which a pattern is no longer tried."""
MOST_PATHS = 10_000
"""Subschemas that apply to one value, at most; references can double them at every step."""
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
VALUES = frozenset({"enum", "const", "default", "examples"})
"""Keywords with values, not schemas."""
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"})
"""Keywords with schemas by name; a name may equal any keyword."""
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_IN_PLACE = ("not", "if", "then", "else")
_ALL_IN_PLACE = ("allOf", "anyOf", "oneOf")


class SlowPattern(Exception):
    """A regular expression of the schema takes too long on a string."""

    def __init__(self, pattern: str) -> None:
        super().__init__(f"the pattern {pattern!r} takes longer than {SECONDS:g} s to search for")


class Schema:
    """A checked JSON Schema.

    Args:
        schema: of any draft; ``$schema`` names it, else draft 2020-12.

    Attributes:
        validator: a `jsonschema` validator; ``iter_errors`` may raise `SlowPattern`.
        resolver: looks up references at the top level.

    Raises:
        TellError: it is not a valid JSON Schema, or a ``$ref`` leads nowhere (none is fetched) or back to itself.
    """

    def __init__(self, schema: Any) -> None:
        import referencing
        from jsonschema import Draft202012Validator, validators
        from jsonschema.exceptions import SchemaError
        from referencing.jsonschema import specification_with

        if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
            raise bad_schema(f"$schema is {schema['$schema']!r}, not the name of a draft", "$")
        try:
            cls = validators.validator_for(schema, default=Draft202012Validator)
        except ValueError as error:  # no URL: "https://[x"
            raise bad_schema(f"$schema is {brief(schema['$schema'])}, not the name of a draft", "$") from error
        try:
            cls.check_schema(schema)
        except SchemaError as error:
            raise bad_schema(f"not a valid JSON Schema ({brief(error.message, 120)})", error.json_path) from error
        except RecursionError as error:
            raise bad_schema("nested too deeply", "$") from error
        # Without $schema: with it, a reference to the root would use jsonschema's own class of validator.
        self.schema = _without_dialect(schema)
        specification = specification_with(str(cls.META_SCHEMA["$schema"]))
        resource = specification.create_resource(self.schema)
        self.resolver = referencing.Registry().resolver_with_root(resource)
        self._steps: dict[int, list[dict]] = {}
        self._repeating: list[str] = []
        self._unevaluated = False
        self._targets: list[tuple[object, str, Resolver]] = []
        self._check(self.schema, "$", self.resolver, specification)
        while self._targets:  # a reference may lead into values, or anywhere
            target, path, resolver = self._targets.pop()
            if isinstance(target, dict) and id(target) not in self._steps:
                self._check(target, path, resolver, specification)
        if self._unevaluated and self._repeating:  # jsonschema searches for these itself, without a time limit
            raise bad_schema(f"unevaluatedProperties with the pattern {self._repeating[0]!r} might never end", "$")
        self._refuse_loops()
        search = _Search()
        keywords = {
            "pattern": search.pattern,
            "patternProperties": search.pattern_properties,
            "additionalProperties": search.additional_properties,
        }
        known = {name: check for name, check in keywords.items() if name in cls.VALIDATORS}
        # An empty registry: the default one would fetch unknown $refs from the network.
        self.validator = validators.extend(cls, known)(self.schema, registry=referencing.Registry())
        self.extra_keys = search.extra_keys

    def parts(self, node: object) -> Iterator[dict]:
        """``node`` and the schemas that ``$ref``, ``anyOf``, ``oneOf`` and ``allOf`` lead to, each once."""
        yield from self.unseen_parts(node, set())

    def unseen_parts(self, node: object, seen: set[int]) -> Iterator[dict]:
        """`parts` without those in ``seen`` (by ``id``), which are added to it."""
        if not isinstance(node, dict) or id(node) in seen:
            return
        seen.add(id(node))
        yield node
        if isinstance(ref := node.get("$ref"), str):
            yield from self.unseen_parts(self.resolver.lookup(ref).contents, seen)
        for word in ("anyOf", "oneOf", "allOf"):
            for part in node.get(word, ()):
                yield from self.unseen_parts(part, seen)

    def properties(self, node: object) -> Iterator[tuple[str, object]]:
        """Key and schema of each property of ``node``; a key may come twice."""
        for part in self.parts(node):
            yield from part.get("properties", {}).items()

    def _check(self, node: object, path: str, resolver: Resolver, specification: Specification) -> None:
        """Refuse what ``check_schema`` accepts but validation cannot handle; record subschemas that apply in place."""
        if isinstance(node, list):
            for i, item in enumerate(node):
                self._check(item, f"{path}[{i}]", resolver, specification)
        if not isinstance(node, dict):
            return
        if any(isinstance(node.get(key), str) for key in ("$id", "id")):  # id up to draft 4
            try:
                resolver = resolver.in_subresource(specification.create_resource(node))
            except ValueError as error:
                raise bad_schema("its $id is no URI", path) from error
        steps = [node[word] for word in _IN_PLACE if word in node]
        for word in _ALL_IN_PLACE:
            steps += node[word] if isinstance(node.get(word), list) else []
        dependent = node.get("dependentSchemas")
        steps += dependent.values() if isinstance(dependent, dict) else []
        for word in REFERENCES:
            if isinstance(ref := node.get(word), str):
                try:
                    found = resolver.lookup(ref)
                except Exception as error:  # referencing's own errors, and ValueError and the like for malformed URIs
                    raise bad_schema(f"{word} {ref!r} leads nowhere; nothing is fetched", path) from error
                steps.append(found.contents)
                self._targets.append((found.contents, f"{path}.{word}", found.resolver))
        named = _keys(node.get("patternProperties"))
        self._repeating += [pattern for pattern in named if _REPEATED_GROUP.search(pattern)]
        self._unevaluated |= "unevaluatedProperties" in node
        for pattern in (node.get("pattern"), *named):
            if isinstance(pattern, str):
                _compiled(pattern, path)
        self._steps[id(node)] = [step for step in steps if isinstance(step, dict)]
        for key, value in node.items():
            if key in NAMED and isinstance(value, dict):
                for name, part in value.items():
                    self._check(part, f"{path}.{key}.{name}", resolver, specification)
            elif key not in VALUES:
                self._check(value, f"{path}.{key}", resolver, specification)

    def _refuse_loops(self) -> None:
        """Refuse references that lead back to their start without going into the value, and too many of them."""
        paths: dict[int, int] = {}
        for start in self._steps:
            stack, open_ = [(start, iter(self._steps[start]))], {start}
            while stack:
                node, left = stack[-1]
                step = next(left, None)
                if step is None:
                    paths[node] = 1 + sum(paths.get(id(s), 1) for s in self._steps[node])
                    if paths[node] > MOST_PATHS:
                        raise bad_schema(f"more than {MOST_PATHS:,} subschemas apply to one value", "$")
                    open_.discard(node)
                    stack.pop()
                elif id(step) in open_:
                    raise bad_schema("a $ref leads back to itself", "$")
                elif id(step) in self._steps and id(step) not in paths:
                    open_.add(id(step))
                    stack.append((id(step), iter(self._steps[id(step)])))


def bad_schema(what: str, path: str) -> TellError:
    return TellError(what, where=f"schema at {path}", remedy=FIX_SCHEMA)


def _keys(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _without_dialect(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_dialect(item) for item in node]
    if not isinstance(node, dict):
        return node
    out = {key: value for key, value in node.items() if not (key == "$schema" and isinstance(value, str))}
    for key, value in out.items():
        if key in NAMED and isinstance(value, dict):
            out[key] = {name: _without_dialect(part) for name, part in value.items()}
        elif key not in VALUES:
            out[key] = _without_dialect(value)
    return out


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str, path: str = "$") -> regex.Pattern:
    import regex  # sacrebleu depends on it; `re` has no time limit

    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise bad_schema(f"the pattern {pattern[:80]!r} is not a regular expression ({error})", path) from error


class _Search:
    """The keywords of JSON Schema that search for patterns."""

    def __init__(self) -> None:
        self._strikes: Counter[str] = Counter()

    def finds(self, pattern: str, text: str) -> bool:
        if self._strikes[pattern] >= STRIKES:
            raise SlowPattern(pattern)
        try:
            return _compiled(pattern).search(text, timeout=SECONDS) is not None
        except TimeoutError as error:
            self._strikes[pattern] += 1
            raise SlowPattern(pattern) from error

    def extra_keys(self, instance: dict, schema: dict) -> list[str]:
        """Keys of ``instance`` that neither ``properties`` nor ``patternProperties`` of ``schema`` know."""
        known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        return [key for key in instance if key not in known and not any(self.finds(p, key) for p in patterns)]

    def pattern(self, validator: Validator, pattern: str, instance: str, schema: dict) -> Errors:
        from jsonschema import ValidationError

        if validator.is_type(instance, "string") and not self.finds(pattern, instance):
            yield ValidationError(f"{instance!r} does not match {pattern!r}")

    def pattern_properties(self, validator: Any, patterns: dict, instance: dict, schema: dict) -> Errors:
        if not validator.is_type(instance, "object"):
            return
        for pattern, subschema in patterns.items():
            for key, value in instance.items():
                if self.finds(pattern, key):
                    yield from validator.descend(value, subschema, path=key, schema_path=pattern)

    def additional_properties(self, validator: Any, allowed: object, instance: dict, schema: dict) -> Errors:
        from jsonschema import ValidationError

        if not validator.is_type(instance, "object") or not (extra := self.extra_keys(instance, schema)):
            return
        if validator.is_type(allowed, "object"):
            for key in extra:
                yield from validator.descend(instance[key], allowed, path=key)
        elif not allowed:
            verb = "was" if len(extra) == 1 else "were"
            shown = ", ".join(map(repr, extra))
            yield ValidationError(f"Additional properties are not allowed ({shown} {verb} unexpected)")
