"""Plain text work that the rule judges share: normalising, sentences, and "is this English?"."""

from __future__ import annotations

import re
import unicodedata

_CHARS = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4\uff07", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\uff02", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", None),
    }
)
_CODE = re.compile(r"```.*?(?:```|\Z)", re.S)
_CONTRACTIONS = [
    (re.compile(pattern), full)
    for pattern, full in (
        (r"\bcan'?t\b", "cannot"),
        (r"\bcan not\b", "cannot"),
        (r"\bwon't\b", "will not"),
        (r"\b(do|does|did|is|are|was|were|would|could|should|have|has)n't\b", r"\1 not"),
        (r"\bdont\b", "do not"),
        (r"\bi'm\b", "i am"),
        (r"\b(it|that|there|he|she|what|here)'s\b", r"\1 is"),
        (r"\b(i|you|we|they)'ve\b", r"\1 have"),
        (r"\b(you|we|they)'re\b", r"\1 are"),
        (r"\b(i|it|that|you|we)'d\b", r"\1 would"),
        (r"\b(i|it|you|we)'ll\b", r"\1 will"),
    )
]
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")


def straighten(text: str) -> str:
    """NFKC, straight quotes and dashes, no zero-width characters. Case, line breaks and backticks stay."""
    return unicodedata.normalize("NFKC", text.translate(_CHARS))


def plain(text: str) -> str:
    """`straighten`, lower case, contractions written out, fenced code and Markdown emphasis removed.

    >>> plain("I\u2019m **sorry**, I can\u2019t.")
    'i am sorry, i cannot.'
    """
    out = re.sub(r"[*_#>]+", "", _CODE.sub(" ", straighten(text))).replace("`", "'").lower()
    for pattern, full in _CONTRACTIONS:
        out = pattern.sub(full, out)
    return re.sub(r"[ \t]+", " ", out).strip()


def sentences(text: str, most: int | None = None) -> list[str]:
    """Sentences (or lines) of plain text, empty ones left out; at most the first `most`."""
    parts = [p.strip(" \"'-") for p in _SENTENCE_END.split(text)]
    parts = [p for p in parts if p]
    return parts if most is None else parts[:most]


# Function words that are not also common English words; a handful per language is enough to see a sentence.
_ENGLISH = frozenset(
    [
        "the",
        "and",
        "of",
        "to",
        "is",
        "that",
        "for",
        "you",
        "with",
        "this",
        "are",
        "it",
        "not",
        "be",
        "as",
        "on",
        "have",
        "your",
        "can",
        "or",
        "by",
        "from",
        "i",
        "an",
        "at",
        "they",
        "we",
        "if",
        "but",
        "which",
        "will",
        "what",
        "there",
        "one",
        "all",
        "has",
        "was",
        "he",
        "she",
        "his",
        "her",
        "my",
        "do",
        "how",
        "when",
        "who",
        "would",
        "about",
        "more",
        "some",
        "no",
        "so",
        "up",
        "out",
        "please",
        "sorry",
        "yes",
        "just",
        "like",
        "its",
        "into",
        "their",
        "them",
        "these",
        "than",
        "then",
        "also",
        "any",
        "where",
        "why",
    ]
)
_FOREIGN = {
    language: frozenset(words.split())
    for language, words in {
        "es": "el los las una es que por para con pero puedo lo siento está como esta este muy del al sobre "
        "su ayudar información más también esto hacer usted hay gracias y solicitud",
        "fr": "le les des une est que je vous pour avec dans pas suis désolé mais cette cela peux du "
        "sur qui votre ne ce au il elle être aider demande et nous aussi bonjour",
        "de": "der das und ist nicht ich sie ein eine mit für auf kann leider tut mir leid zu den dem aber "
        "bei dabei helfen ihnen diese auch oder wie es wir sich entschuldigung keine",
        "pt": "não uma você para mas posso desculpe isso este esta é que em ajudar seu sua mais por também "
        "informações sinto muito fazer ao dos das",
        "it": "il gli una è che con ma posso mi dispiace questo questa sono della di aiutarti aiutare più "
        "anche nel richiesta sul",
        "nl": "het een niet ik kan maar voor van dat deze zijn helaas je ook bij dit wij kunnen geen helpen "
        "als naar",
        "sv": "jag inte det är och att en ett kan med som för tyvärr hjälpa detta på av har om vi ledsen",
        "pl": "nie jest się na że mogę przepraszam ale dla jak tego tym pomóc czy są oraz jestem w",
        "tr": "bir bu için üzgünüm ancak yardımcı olamam değil ile ben bunu çok gibi daha konuda",
        "id": "tidak saya dan yang maaf bisa untuk dengan ini itu anda dalam adalah dapat membantu tentang",
        "vi": "tôi không xin lỗi thể và là của cho bạn này với được trong giúp một các",
        "ro": "nu este și pentru cu pot îmi pare rău să că dar acest această ajuta vă sunt",
        "fi": "en voi ei ja se että mutta valitettavasti auttaa tämä olen sinua asiassa",
        "da": "jeg ikke det er og en kan med som desværre hjælpe dette på af har beklager",
        "cs": "nemohu je na že se omlouvám ale pro jako jsem vám pomoci této nebo lituji",
        "hu": "nem az és hogy sajnálom de egy ez segíteni tudok ebben vagy kérem",
    }.items()
}


def foreign(text: str) -> str | None:
    """Why a reply does not look English, or None.

    Code is ignored. Evidence is needed to say "not English": a non-Latin script, more function words of one
    other language than English ones, or a longer text in running sentences without a single English function
    word. Very short replies, names, numbers and lists stay English.

    >>> foreign("Lo siento, no puedo ayudar con eso.")
    'es'
    """
    body = re.sub(r"`[^`]*`|https?://\S+", " ", _CODE.sub(" ", straighten(text))).lower()
    scripts = [unicodedata.name(c, "?").split()[0] for c in body if c.isalpha()]
    other = [s for s in scripts if s != "LATIN" and not (s == "GREEK" and len(scripts) <= 5)]
    if len(other) > 0.5 * len(scripts):
        return f"{other[0].lower()} script"
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", body)
    english = sum(w.split("'")[0] in _ENGLISH for w in words)
    best, hits = max(
        ((lang, sum(w in known for w in words)) for lang, known in _FOREIGN.items()), key=lambda x: x[1]
    )
    if hits >= 2 and hits > english and hits >= 0.15 * len(words):
        return best
    runs = [len(s.split()) for s in re.split(r"[,;:.!?\n|=(){}\[\]<>]+", body) if s.strip()]
    if len(words) >= 12 and english == 0 and sum(runs) / max(len(runs), 1) >= 4:
        return "no English function words"
    return None
