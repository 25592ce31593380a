"""One page to look at: what was searched, predicted or advised, in a file that needs no network."""

from lightning_dhellam.search.report.page.predicted import advice_page, prediction_page
from lightning_dhellam.search.report.page.searched import search_page
from lightning_dhellam.search.report.page.values import Page, save_page, view_of

__all__ = ["Page", "advice_page", "prediction_page", "save_page", "search_page", "view_of"]
