import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.report.before_after import BeforeAfter, QueryChange, compare_results, write_queries
from clpl_moe.report.options import ReportArguments
from helpers.reports import TEXTS, make_data


def test_gained_and_lost_queries_with_what_was_retrieved(tmp_path):
    data = make_data(tmp_path)
    options = ReportArguments(output="", runs=["run"], passages=1)
    found = compare_results("run", data / "before", data / "after", "fa", options)
    assert [(q.id, round(q.before, 4), q.after) for q in found.gained] == [("q0", 0.6309, 1.0)]
    assert [(q.id, q.before, q.after) for q in found.lost] == [("q1", 1.0, 0.0)]
    (query,) = found.gained
    assert query.relevant == [TEXTS["fa"][0]]
    assert [(hit.rank, hit.text, hit.relevant) for hit in query.hits_before] == [(1, TEXTS["fa"][1], False)]
    assert [(hit.rank, hit.text, hit.relevant) for hit in query.hits_after] == [(1, TEXTS["fa"][0], True)]
    assert found.counts() == (1, 1, 1)
    assert found.mean("before") == pytest.approx((0.63093 + 1 + 1) / 3, abs=1e-5)
    assert found.mean("after") == pytest.approx(2 / 3)


@pytest.mark.parametrize("line", ["q0 Q0 p9 1 2.0 x", "q9 Q0 p0 1 2.0 x"])
@pytest.mark.parametrize("which", ["before", "after"])
def test_results_with_an_id_that_the_collection_lacks_are_refused(tmp_path, which, line):
    data = make_data(tmp_path)
    with (data / which / "fa" / "run.trec").open("a") as file:
        file.write(line + "\n")
    options = ReportArguments(output="", runs=["run"])
    with pytest.raises(UserError, match=rf"{which}/fa/run\.trec:6: found '[pq]9', expected the id of a"):
        compare_results("run", data / "before", data / "after", "fa", options)


def test_a_query_that_a_spreadsheet_would_run_is_text(tmp_path):
    query = QueryChange("=1", "=cmd|'/c calc'!A1", 1.0, 0.5)
    write_queries(tmp_path / "q.csv", [BeforeAfter("+run", "ko", "nDCG@5", [query], [], [], 1)])
    row = (tmp_path / "q.csv").read_text().splitlines()[1]
    assert row == "'+run,ko,'=1,'=cmd|'/c calc'!A1,1,0.5,-0.5"
