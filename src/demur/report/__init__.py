"""Rendering only: a Report as text, Markdown, JSON and CSV; a card as HTML; files of answers read in."""

from demur.report.importers import Answers, load_answers
from demur.report.render import clean, to_csv, to_json, to_markdown, to_text

__all__ = ["Answers", "clean", "load_answers", "to_csv", "to_json", "to_markdown", "to_text"]
