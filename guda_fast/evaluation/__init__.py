"""Agreement of score matrices with an oracle: metrics, bootstrap intervals, tables and figures."""

from guda_fast.evaluation.bootstrap import Interval, bootstrap_mean
from guda_fast.evaluation.figure import ranking_figure
from guda_fast.evaluation.metrics import kendall, mrr, ndcg, rbo, spearman, top_1_agreement, top_k_overlap
from guda_fast.evaluation.table import (
    AgreementRow,
    AgreementTable,
    RankingRow,
    RankingTable,
    agreement,
    ranking,
)

__all__ = [
    "AgreementRow",
    "AgreementTable",
    "Interval",
    "RankingRow",
    "RankingTable",
    "agreement",
    "bootstrap_mean",
    "kendall",
    "mrr",
    "ndcg",
    "ranking",
    "ranking_figure",
    "rbo",
    "spearman",
    "top_1_agreement",
    "top_k_overlap",
]
