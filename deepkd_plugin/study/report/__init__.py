"""`deepkd report`: what a table's runs show, as Markdown, CSV and one page."""

from .write import report

__all__ = ["report"]
