"""Names of columns: where the header is, what to do with equal names, and words that tell prompts from pictures."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final

from embedding_relay.batch.workbook.cells import Row, column_letter

# Earlier words win: a "prompt" is one for certain, a "description" only when nothing better is there.
PROMPT_WORDS: Final = (
    *("prompt", "prompts", "question", "questions", "query", "instruction", "instructions", "request", "task"),
    *("frage", "fragen", "anweisung", "anweisungen", "anfrage", "aufgabe"),
    *("invite", "consigne", "consignes", "requête", "requete", "instruction"),
    *("pregunta", "preguntas", "instrucción", "instruccion", "instrucciones", "consulta"),
    *("提示词", "提示詞", "提示", "问题", "問題", "提问", "指令", "指示", "要求"),
    *("プロンプト", "質問", "設問", "命令"),
    *("text", "texts", "input", "content", "message", "texte", "texto", "entrada", "eingabe", "inhalt", "nachricht"),
    *("contenu", "contenido", "mensaje", "文本", "内容", "內容", "输入", "輸入", "原文", "テキスト", "本文", "入力"),
    *("description", "beschreibung", "descripción", "descripcion", "描述", "説明"),
)
PICTURE_WORDS: Final = (
    *("image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos", "scan", "scans"),
    *("bild", "bilder", "foto", "fotos", "abbildung", "imagen", "imágenes", "imagenes", "photographie"),
    *("图片", "圖片", "图像", "圖像", "照片", "图", "圖", "画像", "写真", "イメージ"),
)
# These may lead to pictures, or to anything else.
PLACE_WORDS: Final = (
    *("url", "urls", "link", "links", "file", "files", "filename", "path", "datei", "pfad", "fichier", "lien"),
    *("archivo", "enlace", "文件", "链接", "地址", "路径", "ファイル", "リンク"),
)
IMAGE_WORDS: Final = (*PICTURE_WORDS, *PLACE_WORDS)
HEADER_CHARS: Final = 80
# Some words and a full stop (or what ends a sentence elsewhere); a header may well be "Question?".
SENTENCE: Final = re.compile(r".{16,}[.!?\u3002\uff01\uff1f\u2026]\s*", re.DOTALL)
VALUE: Final = re.compile(r"(?i)(https?|file|ftp|data):|.*\.(png|jpe?g|gif|webp|bmp|tiff?)$")
WORD: Final = re.compile(r"[^\W\d_]+")


def normalized(name: str) -> str:
    return unicodedata.normalize("NFKC", name).strip().casefold()


def rank(name: str, words: Sequence[str]) -> int:
    """How well a header fits: 0 not at all; the whole header beats a part of it, earlier words beat later ones."""
    whole = normalized(name)
    parts = set(WORD.findall(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold()))
    best = 0
    for position, word in enumerate(words):
        value = len(words) - position
        if whole == word:
            best = max(best, value + len(words))
        elif word in parts or (not word.isascii() and ord(word[0]) > 0x2E7F and word in whole):
            best = max(best, value)
    return best


def is_word(name: str, words: Sequence[str]) -> bool:
    """Whether the whole header is one of the words."""
    return normalized(name) in words


def find_header(rows: Sequence[Row]) -> Row | None:
    """The row that names the columns, among the first ones that are not empty; None when all of them are data.

    A row of short texts with a word that we know is the header. Else it is the first row that is about as wide as the
    widest, so that a title above the table is none, and only if nothing in it looks like a value.
    """
    for row in rows:
        if looks_like_names(row) and any(
            is_word(cell.text, PROMPT_WORDS) or is_word(cell.text, IMAGE_WORDS) for cell in row.cells.values()
        ):
            return row
    widest = max((len(row.cells) for row in rows), default=0)
    for row in rows:
        if len(row.cells) * 2 >= widest:
            return row if looks_like_names(row) else None
    return None


def looks_like_names(row: Row) -> bool:
    texts = [cell for cell in row.cells.values() if not cell.pictures]
    return bool(texts) and all(
        cell.is_text
        and not cell.problem
        and len(cell.text) <= HEADER_CHARS
        and not SENTENCE.fullmatch(cell.text)
        and not VALUE.match(cell.text.strip())
        for cell in texts
    )


def unique(name: str, taken: Iterable[str]) -> str:
    """`name`, or `name (2)` where a column has that name already, in whatever case."""
    folded = {other.casefold() for other in taken}
    candidate, number = name, 1
    while candidate.casefold() in folded:
        number += 1
        candidate = f"{name} ({number})"
    return candidate


def name_columns(header: Row | None, used: Iterable[int]) -> dict[int, str]:
    """A name for each column that is used; those without a header are called by their letters."""
    given = {} if header is None else {index: cell.text.strip() for index, cell in header.cells.items()}
    names: dict[int, str] = {}
    taken: set[str] = set()
    counts: dict[str, int] = {}
    for index in sorted({*given, *used}):
        wanted = name = given.get(index) or column_letter(index)
        while name in taken:
            counts[wanted] = counts.get(wanted, 1) + 1
            name = f"{wanted} ({counts[wanted]})"
        taken.add(name)
        names[index] = name
    return names
