"""The table of every request property of the OpenAI specification, and what Galley does with it.

``extract SPEC`` reads the specification (YAML, plain or gzipped; needs PyYAML) and writes the names it finds
to ``docs/api/openai-properties.json``. ``table`` writes the table of ``docs/API.md`` from those names and the
decisions of ``docs/api/decisions.toml``; a test holds the two files together and the document up to date, and
another asks a server every one of these questions.
"""

import gzip
import hashlib
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NAMES = ROOT / "docs/api/openai-properties.json"
DECISIONS = ROOT / "docs/api/decisions.toml"
DOCUMENT = ROOT / "docs/API.md"
BEGIN, END = "<!-- properties:begin -->", "<!-- properties:end -->"

PATHS = (
    "/chat/completions",
    "/chat/completions/{completion_id}",
    "/chat/completions/{completion_id}/messages",
    "/completions",
    "/responses",
    "/responses/{response_id}",
    "/responses/{response_id}/cancel",
    "/responses/{response_id}/input_items",
    "/responses/input_tokens",
    "/responses/compact",
    "/embeddings",
    "/files",
    "/files/{file_id}",
    "/files/{file_id}/content",
    "/batches",
    "/batches/{batch_id}",
    "/batches/{batch_id}/cancel",
    "/models",
    "/models/{model}",
)
MEANINGS = {
    "supported": "does what the specification says",
    "400": "refused: `unsupported_parameter` (or `unsupported_value`) naming it, when given a meaning",
    "named": "has no effect and is named in the header `x-galley-ignored-params` and on the receipt",
    "404": "the operation is not there",
}


class Specification:
    """An OpenAPI document, read for its names."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def resolve(self, node: dict[str, Any]) -> dict[str, Any]:
        """A node, or what its ``$ref`` names."""
        while "$ref" in node:
            found: Any = self.document
            for part in node["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            node = found
        return node

    def properties(self, node: dict[str, Any], seen: frozenset[int] = frozenset()) -> dict[str, list[Any]]:
        """Every property of an object schema through allOf, anyOf and oneOf, with its schemas."""
        node = self.resolve(node)
        if id(node) in seen:
            return {}
        found: dict[str, list[Any]] = {name: [inner] for name, inner in node.get("properties", {}).items()}
        for way in ("allOf", "anyOf", "oneOf"):
            for part in node.get(way, ()):
                for name, inner in self.properties(part, seen | {id(node)}).items():
                    found.setdefault(name, []).extend(inner)
        return found

    def names(self, schema: dict[str, Any], depth: int = 2) -> Iterator[str]:
        """Dotted names of an object's properties, ``depth`` levels deep; arrays are not entered."""
        for name, schemas in sorted(self.properties(schema).items()):
            yield name
            if depth > 1:
                inner = {each for part in schemas for each in self.names(part, depth - 1)}
                yield from (f"{name}.{each}" for each in sorted(inner))

    def operations(self) -> Iterator[tuple[str, list[str]]]:
        """``POST /v1/completions`` and its properties; those in the query string begin with ``?``."""
        for path in PATHS:
            item = self.document["paths"][path]
            for method in ("get", "post", "delete"):
                if method not in item:
                    continue
                operation = item[method]
                found = []
                for each in (*item.get("parameters", ()), *operation.get("parameters", ())):
                    parameter = self.resolve(each)
                    if parameter["in"] == "query":
                        found.append("?" + parameter["name"])
                body = self.resolve(operation.get("requestBody", {}))
                for content in body.get("content", {}).values():
                    found += self.names(content["schema"])
                yield f"{method.upper()} /v1{path}", sorted(set(found))


def extract(source: Path) -> None:
    """Write the names found in a specification."""
    import yaml

    raw = source.read_bytes()
    text = gzip.decompress(raw) if source.suffix == ".gz" else raw
    document = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    facts = {
        "specification": {
            "title": document["info"]["title"],
            "version": document["info"]["version"],
            "sha256": hashlib.sha256(text).hexdigest(),
        },
        "operations": dict(Specification(document).operations()),
    }
    NAMES.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def decisions() -> dict[str, dict[str, tuple[str, str]]]:
    """``{operation: {property: (class, note)}}``."""
    table = tomllib.loads(DECISIONS.read_text(encoding="utf-8"))
    return {
        operation: {
            name: (word, "") if isinstance(word, str) else (word[0], word[1]) for name, word in rows.items()
        }
        for operation, rows in table.items()
    }


def names() -> dict[str, list[str]]:
    """``{operation: [property]}`` of the specification."""
    found: dict[str, list[str]] = json.loads(NAMES.read_text(encoding="utf-8"))["operations"]
    return found


def table() -> str:
    """The generated part of ``docs/API.md``."""
    version = json.loads(NAMES.read_text(encoding="utf-8"))["specification"]["version"]
    lines = [f"Properties of version {version} of the specification. Classes:", ""]
    lines += [f"- **{word}**: {meaning}" for word, meaning in MEANINGS.items()]
    decided = decisions()
    counts: dict[str, int] = {}
    for operation, properties in names().items():
        rows = decided[operation]
        lines += ["", f"### `{operation}`", ""]
        if "*" in rows:
            word, note = rows["*"]
            counts[word] = counts.get(word, 0) + max(1, len(properties))
            lines.append(f"**{word}**" + (f": {note}" if note else ""))
            continue
        if not properties:
            lines.append("**supported**; it has no properties.")
            continue
        lines += ["| property | class | note |", "|---|---|---|"]
        for name in properties:
            word, note = rows[name]
            counts[word] = counts.get(word, 0) + 1
            lines.append(f"| `{name}` | {word} | {note} |")
    total = ", ".join(f"{count} {word}" for word, count in sorted(counts.items(), reverse=True))
    lines[1:1] = ["", f"Of {sum(counts.values())} properties: {total}."]
    return "\n".join(lines) + "\n"


def written(document: str) -> str:
    """The document with its table replaced."""
    head, _, rest = document.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}{END}{tail}"


def main(arguments: list[str]) -> None:
    if len(arguments) == 2 and arguments[0] == "extract":
        extract(Path(arguments[1]))
    elif arguments == ["table"]:
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.exit("usage: api_table.py extract SPECIFICATION | table")


if __name__ == "__main__":
    main(sys.argv[1:])
