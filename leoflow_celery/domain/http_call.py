"""What an HTTP call of a task may say: its URL and headers, and the template that puts values into them and its body.

Pure, and the same at the door, in the inline worker and in an agent. A placeholder is ``{{ xcom.NAME }}``,
``{{ args.NAME }}`` or ``{{ env.NAME }}``; ``.KEY`` and ``.INDEX`` after the name go into an object or a list.
Nothing is evaluated: a value is looked up, escaped for its place and put there. ``{{ "{{" }}`` is a literal ``{{``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from html import escape as escape_xml
from typing import Annotated, Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

from pydantic import AfterValidator, Field, WithJsonSchema

from leoflow_celery.domain.fields import Label, is_printable, is_storable

MAX_URL_CHARACTERS = 8_192
#: Servers refuse longer ones; 8 KiB for all of a message's headers is common.
MAX_HEADER_CHARACTERS = 16_384
#: Characters that all values of one call may add up to, escaped: a short template can name a long value often.
MAX_FILLED_CHARACTERS = 4_194_304

#: They say where a message ends and what becomes of its connection, or where it goes: the sender's business alone.
_OUR_HEADERS = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "http2-settings",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
#: RFC 9110, 5.5: visible characters and Latin-1, spaces and tabs between them.
_HEADER_VALUE = re.compile(r"(?:[!-~\xa0-\xff](?:[\t -~\xa0-\xff]*[!-~\xa0-\xff])?)?")
_FORBIDDEN_IN_URLS = re.compile(r"[\s\\\x00-\x20\x7f]")
_AUTHORITY = re.compile(r"https?://[^/?#\\\s]+", re.IGNORECASE)

_PLACEHOLDER = re.compile(r'\{\{ *(?:("\{\{")|([^{}"\s]+)) *\}\}')
_EXPRESSION = re.compile(r"(xcom|args|env)\.([A-Za-z_][A-Za-z0-9_-]*)((?:\.[A-Za-z0-9_-]+)*)")
_USABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_JSON_QUOTE = re.compile(r'\\.|(")', re.DOTALL)
_SOURCE_FIELDS = {"xcom": "xcom_input", "args": "call_args", "env": "env"}
_FORM = "application/x-www-form-urlencoded"


class TemplateError(ValueError):
    """A template or a value in it cannot be used. ``text`` names the value and the fix, never what the value is."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(f"{field}: {text}")
        self.field, self.text = field, text


# What may be sent.


def check_url(value: str) -> str:
    """The URL again.

    Raises:
        ValueError: it names no host that can be called, or it would not be one word of a request line.
    """
    if not _AUTHORITY.match(value):
        raise ValueError("is not an http or https URL with a host; write for example https://api.example.com/v1")
    if _FORBIDDEN_IN_URLS.search(_PLACEHOLDER.sub("", value)):
        raise ValueError("holds a space, line break or backslash; write %20, %0A or %5C")
    if not _names_a_host(value):
        raise ValueError("names no host and port that can be called; write for example https://api.example.com:8443/v1")
    return value


def _names_a_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets around what is no address, a port that is no number, characters that hide others
        return False


def check_header_name(name: str) -> str:
    """The name of a header again.

    Raises:
        ValueError: it is not a token, or it is a header that only the sender of a message may set.
    """
    if not _TOKEN.fullmatch(name):
        raise ValueError("is not the name of an HTTP header; letters, digits and '-' only, as in X-Request-Id")
    plain = name.lower().replace("_", "-")  # many servers take one for the other
    if plain in _OUR_HEADERS or plain.startswith("proxy-"):
        fix = "write the host into url" if plain == "host" else "remove it"
        raise ValueError(
            f"is a header that frames or routes the message, which the executor does itself; {fix} (got {name!r})"
        )
    return name


def check_header_value(value: str) -> str:
    """The value of a header again.

    Raises:
        ValueError: it is not one line of Latin-1 text.
    """
    if len(value) > MAX_HEADER_CHARACTERS:
        raise ValueError(f"has {len(value)} characters, the limit is {MAX_HEADER_CHARACTERS}; send it in the body")
    if not is_storable(value):
        raise ValueError("holds a NUL character or half a surrogate pair, which no header takes; remove it")
    if not _HEADER_VALUE.fullmatch(value):
        raise ValueError(
            "is one line of an HTTP message: Latin-1 text without line breaks, control characters and spaces at its "
            "ends; encode it, for example as percent or Base64 encoding"
        )
    return value


def _different_names(headers: dict[str, str]) -> dict[str, str]:
    seen: dict[str, str] = {}
    for name in headers:
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise ValueError(f"{other!r} and {name!r} are one header; remove one")
    return headers


def check_headers(headers: Mapping[str, str]) -> None:
    """All headers of a message that is about to be sent.

    Raises:
        TemplateError: names the header.
    """
    for name, value in headers.items():
        try:
            check_header_name(name)
            check_header_value(value)
        except ValueError as error:
            shown = name if is_printable(name) else ascii(name)
            raise TemplateError(f"http_request.headers.{shown}", str(error)) from None


Url = Annotated[
    Label,
    Field(max_length=MAX_URL_CHARACTERS),
    AfterValidator(check_url),
    WithJsonSchema({"type": "string", "pattern": r"^https?://[^\s/?#\\]+", "maxLength": MAX_URL_CHARACTERS}),
]
HeaderName = Annotated[Label, AfterValidator(check_header_name)]
HeaderValue = Annotated[str, AfterValidator(check_header_value)]
Headers = Annotated[dict[HeaderName, HeaderValue], AfterValidator(_different_names)]


# The template.


@dataclass(frozen=True, slots=True)
class Values:
    """What placeholders may name. ``xcom`` None: the values come at run time, ``xcom_names`` are their names."""

    args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    xcom: Mapping[str, Any] | None = None
    xcom_names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    #: Variables that are known by name only, the secrets of a task that an agent runs.
    secret_names: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Filled:
    """A call without placeholders. ``used`` holds (source, name) of every value that went into it."""

    url: str
    headers: dict[str, str]
    body: Any
    used: frozenset[tuple[str, str]]


#: Stands for a value that comes at run time.
_LATER = object()


@dataclass(slots=True)
class _Filling:
    """One filling of one call: looks values up, counts what they add, remembers which were used."""

    values: Values
    used: set[tuple[str, str]] = field(default_factory=set)
    #: What an expression came to in a kind of place: a value named a thousand times is escaped once.
    texts: dict[tuple[Any, str], str] = field(default_factory=dict)
    characters: int = 0

    def fill(self, place: str, text: str, into: Callable[[str, str, str, Any], str]) -> str:
        """The text with its placeholders replaced; ``into`` turns (place, expression, text before, value) into text."""
        if "{{" not in text:
            return text
        parts: list[str] = []
        end = since = 0
        for start, stop, expression in _placeholders(place, text):
            parts.append(text[end:start])
            if expression is None:
                parts.append("{{")
            else:
                filled = into(place, expression, text[since:start], self.look_up(place, expression))
                self.count(place, len(filled))
                parts.append(filled)
                since = stop
            end = stop
        return "".join([*parts, text[end:]])

    def count(self, place: str, characters: int) -> None:
        self.characters += characters
        if self.characters > MAX_FILLED_CHARACTERS:
            raise TemplateError(
                place,
                f"values add more than {MAX_FILLED_CHARACTERS} characters to the call; name fewer or smaller ones",
            )

    def look_up(self, place: str, expression: str) -> Any:
        found = _EXPRESSION.fullmatch(expression)
        if found is None:
            raise TemplateError(
                place,
                f"{_shown(expression)} is not a value; write xcom.NAME, args.NAME or env.NAME, with .KEY or .INDEX "
                'behind it to look inside, and {{ "{{" }} for a literal {{',
            )
        source, name, path = found.groups()
        self.used.add((source, name))
        value = self._value(place, source, name)
        for key in path.split(".")[1:]:
            if value is _LATER:
                break
            value = _inside(place, expression, key, value)
        return value

    def _value(self, place: str, source: str, name: str) -> Any:
        values = self.values
        if source == "env" and name in values.secret_names:
            return values.env.get(name, _LATER)
        known: Mapping[str, Any] = {"args": values.args, "env": values.env, "xcom": values.xcom_names}[source]
        if name not in known:
            raise TemplateError(
                place, f"{source}.{name} is unknown; add {name!r} to {_SOURCE_FIELDS[source]} or correct the name"
            )
        if source != "xcom":
            return known[name]
        if values.xcom is None:
            return _LATER
        if name not in values.xcom:
            raise TemplateError(
                place,
                f"xcom.{name} has no value: task {known[name]!r} left no return_value in this run; have it return one, "
                "or do not run this task without it",
            )
        return values.xcom[name]

    def text(
        self, escape: Callable[[str], str], kind: str, place: str, expression: str, _before: str, value: Any
    ) -> str:
        """A text, number or boolean, escaped."""
        if (known := self.texts.get((kind, expression))) is None:
            known = self.texts[kind, expression] = escape(_scalar(place, expression, value))
        return known

    def json(self, expression: str, value: Any) -> str:
        """Any value as JSON."""
        if (known := self.texts.get(("json", expression))) is None:
            data = "later" if value is _LATER else value
            known = self.texts["json", expression] = json.dumps(data, ensure_ascii=False, allow_nan=False)
        return known


def fill(url: str, headers: Mapping[str, str], body: Any, values: Values) -> Filled:
    """A call with the values in the places that name them. Time and size are linear in the template and the values.

    Raises:
        TemplateError: a placeholder where none may be, an unknown name, or a value that its place does not take.
    """
    filling = _Filling(values)
    return Filled(
        _fill_url(filling, url),
        {name: _fill_header(filling, name, value) for name, value in headers.items()},
        _fill_body(filling, headers, body),
        frozenset(filling.used),
    )


def check_call(url: str, headers: Mapping[str, str], body: Any, values: Values, *, has_agent: bool) -> None:
    """Refuse, before anything runs, a template that cannot be filled and a value that goes nowhere.

    An agent's process has ``env``, whether the call names it or not.

    Raises:
        TemplateError: names the field, the value and the fix.
    """
    used = fill(url, headers, body, values).used
    declared: dict[str, Iterable[str]] = {"xcom": values.xcom_names, "args": values.args}
    if not has_agent:
        declared["env"] = values.env
    for source, names in declared.items():
        for name in names:
            if (source, name) not in used:
                usable = _USABLE_NAME.fullmatch(name)
                fix = (
                    f"write {{{{ {source}.{name} }}}} into url, headers or body, or remove it"
                    if usable
                    else "rename it: a placeholder takes letters, digits, '_' and '-'"
                )
                shown = name if is_printable(name) else ascii(name)
                raise TemplateError(f"{_SOURCE_FIELDS[source]}.{shown}", f"is not used by http_request; {fix}")


def _fill_url(filling: _Filling, url: str) -> str:
    if "{{" not in url:
        return url
    place = "http_request.url"
    authority = _AUTHORITY.match(url)
    if authority is None or "{{" in authority[0]:
        raise TemplateError(place, "a value may not name scheme, user, host or port; write them out")
    rest, hash_sign, fragment = url[authority.end() :].partition("#")
    if "{{" in fragment:
        raise TemplateError(place, "what follows '#' is not sent; put the value into path or query")
    path, question_mark, query = rest.partition("?")
    if '{{ "{{" }}' in rest or '{{"{{"}}' in rest:
        raise TemplateError(place, "a literal {{ in a url is written %7B%7B")
    escape = partial(filling.text, partial(quote, safe=""), "url")
    segments = [_fill_segment(filling, place, segment, escape) for segment in path.split("/")]
    filled = (
        f"{authority[0]}{'/'.join(segments)}{question_mark}{filling.fill(place, query, escape)}{hash_sign}{fragment}"
    )
    if len(filled) > MAX_URL_CHARACTERS:
        raise TemplateError(
            place, f"has {len(filled)} characters with its values, the limit is {MAX_URL_CHARACTERS}; use the body"
        )
    return filled


def _fill_segment(filling: _Filling, place: str, segment: str, escape: Callable[[str, str, str, Any], str]) -> str:
    filled = filling.fill(place, segment, escape)
    if "{{" in segment and unquote(filled) in ("", ".", ".."):
        raise TemplateError(
            place,
            f"the path segment {segment} comes to an empty one, '.' or '..', which names another path; "
            "have the value be a name",
        )
    return filled


def _fill_header(filling: _Filling, name: str, value: str) -> str:
    if "{{" not in value:
        return value
    place = f"http_request.headers.{name}"
    if name.lower() == "content-type":
        raise TemplateError(place, "decides how values in the body are escaped; write it out")
    filled = filling.fill(place, value, partial(filling.text, str, "header"))
    try:
        return check_header_value(filled)
    except ValueError as error:
        raise TemplateError(place, f"with its values, {error}") from None


def _fill_body(filling: _Filling, headers: Mapping[str, str], body: Any) -> Any:
    place = "http_request.body"
    if not isinstance(body, str):
        return _fill_json(filling, place, body)
    if "{{" not in body:
        return body
    content_type = next((value for name, value in headers.items() if name.lower() == "content-type"), "")
    return filling.fill(place, body, _escaping(filling, place, content_type))


def _escaping(filling: _Filling, place: str, content_type: str) -> Callable[[str, str, str, Any], str]:
    """How values go into a text body of this type."""
    mime = content_type.partition(";")[0].strip().lower()
    if mime == _FORM:
        return partial(filling.text, quote_plus, "form")
    if mime.endswith(("/json", "+json", "/x-ndjson", "/ndjson", "/jsonl")):
        return _JsonText(filling).into
    if mime.endswith(("/xml", "+xml", "/html")):
        return partial(filling.text, escape_xml, "xml")
    if mime.startswith("multipart/"):
        raise TemplateError(place, "a value could end a part of a multipart body; send it as JSON or as a form")
    return partial(filling.text, str, "plain")


class _JsonText:
    """JSON written as text: inside a string a value is escaped for it, elsewhere it is a whole JSON value."""

    def __init__(self, filling: _Filling) -> None:
        self._filling, self._in_string = filling, False

    def into(self, place: str, expression: str, before: str, value: Any) -> str:
        without_literals = _PLACEHOLDER.sub("", before)
        quotes = sum(found[1] is not None for found in _JSON_QUOTE.finditer(without_literals))
        self._in_string ^= bool(quotes % 2)
        if self._in_string:
            return self._filling.text(lambda text: json.dumps(text)[1:-1], "json string", place, expression, "", value)
        return self._filling.json(expression, value)


def _fill_json(filling: _Filling, place: str, data: Any) -> Any:
    """Data with its strings filled: one that is a placeholder and nothing else becomes the value itself."""
    match data:
        case str() if "{{" in data:
            found = _PLACEHOLDER.fullmatch(data)
            if found is None or found[2] is None:
                return filling.fill(place, data, partial(filling.text, str, "plain"))
            value = filling.look_up(place, found[2])
            filling.count(place, len(filling.json(found[2], value)))
            return "later" if value is _LATER else value
        case dict():
            if wrong := next((key for key in data if "{{" in key), None):
                raise TemplateError(place, f"a value may not be a key; write {_shown(wrong)} out")
            return {key: _fill_json(filling, place, value) for key, value in data.items()}
        case list():
            return [_fill_json(filling, place, value) for value in data]
    return data


def _placeholders(place: str, text: str) -> Iterable[tuple[int, int, str | None]]:
    """(start, end, expression) of each placeholder; the expression of a literal ``{{`` is None."""
    position = 0
    while (start := text.find("{{", position)) >= 0:
        found = _PLACEHOLDER.match(text, start)
        if found is None:
            raise TemplateError(
                place,
                f"the '{{{{' at character {start + 1} starts no placeholder like {{{{ xcom.NAME }}}}; "
                'write {{ "{{" }} for a literal {{',
            )
        yield start, found.end(), found[2]
        position = found.end()


def _inside(place: str, expression: str, key: str, value: Any) -> Any:
    if isinstance(value, dict) and key in value:
        return value[key]
    if isinstance(value, list) and key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(value):
        return value[int(key)]
    kind = "object" if isinstance(value, dict) else "list" if isinstance(value, list) else "value that has no parts"
    raise TemplateError(
        place,
        f"{_shown(expression)}: there is no {key!r} in the {kind}; correct the path, or what the value's task returns",
    )


def _scalar(place: str, expression: str, value: Any) -> str:
    match value:
        case str():
            if not is_storable(value):
                raise TemplateError(
                    place, f"{_shown(expression)} holds a NUL character, which no call takes; remove it"
                )
            return value
        case bool() | int() | float():
            return json.dumps(value)
        case _ if value is _LATER:
            return "later"
    kind = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else "null"
    raise TemplateError(
        place,
        f"{_shown(expression)} is {kind}, where only text, a number or a boolean can stand; name a part of it, "
        "or make it a whole JSON value of the body",
    )


def _shown(expression: str) -> str:
    text = expression if is_printable(expression) else ascii(expression)
    return text if len(text) <= 80 else f"{text[:77]}..."
