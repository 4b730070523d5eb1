"""Agreement of score matrices with an oracle: metrics, bootstrap intervals, tables and figures."""

from guda_fast.evaluation.agreement_figure import agreement_figure
from guda_fast.evaluation.bootstrap import Interval, bootstrap_mean
from guda_fast.evaluation.confusion import Confusion, confusion
from guda_fast.evaluation.figure import ranking_figure
from guda_fast.evaluation.join import Joined, join
from guda_fast.evaluation.metrics import kendall, lds, mrr, ndcg, rbo, spearman, top_1_agreement, top_k_overlap
from guda_fast.evaluation.report import Evaluation, Options, Subsets, evaluate
from guda_fast.evaluation.significance import SignificanceRow, SignificanceTable, significance
from guda_fast.evaluation.table import (
    AgreementRow,
    AgreementTable,
    RankingRow,
    RankingTable,
    agreement,
    linear_agreement,
    ranking,
)

__all__ = [
    "AgreementRow",
    "AgreementTable",
    "Confusion",
    "Evaluation",
    "Interval",
    "Joined",
    "Options",
    "RankingRow",
    "RankingTable",
    "SignificanceRow",
    "SignificanceTable",
    "Subsets",
    "agreement",
    "agreement_figure",
    "bootstrap_mean",
    "confusion",
    "evaluate",
    "join",
    "kendall",
    "lds",
    "linear_agreement",
    "mrr",
    "ndcg",
    "ranking",
    "ranking_figure",
    "rbo",
    "significance",
    "spearman",
    "top_1_agreement",
    "top_k_overlap",
]
