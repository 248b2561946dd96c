"""What answers a query is never its negative, from the files to the gradients: through dataset, collator, model and loss."""

import pytest
import torch

from clpl_moe import CLPLLoss
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_jsonl
from clpl_moe.data.answers import KnownAnswers
from clpl_moe.data.collator import CLPLCollator
from clpl_moe.data.dataset import CLPLTrainDataset
from clpl_moe.train.__main__ import main
from clpl_moe.train.arguments import CLPLDataArguments
from clpl_moe.train.resume import check_same_run
from helpers.tiny_training import arguments, make_runner, make_triplets


def make_dataset(folder, *files, leave_out_answers=True, guide_margin=None, **options):
    paths = [folder / f"{number}.jsonl" for number in range(len(files))]
    for path, lines in zip(paths, files):
        write_jsonl(path, lines)
    args = CLPLDataArguments(
        train_data=list(map(str, paths)), cache_path=str(folder / "cache"), **{"train_group_size": 3} | options
    )
    return CLPLTrainDataset(args, leave_out_answers=leave_out_answers, guide_margin=guide_margin)


def line(query, pos, neg, neg_q=None):
    return {"query": query, "pos": [pos] if isinstance(pos, str) else pos, "neg": neg, "neg_q": neg_q}


def pushes(tokenizer, dataset, examples=None, **options):
    """How much each query pushes each passage away, (B, P) as a list of what it pushes: text -> weight.

    Passages are the unit vectors, so that the gradient of a query has one entry for each. The query's own positive, which is
    drawn near, is left out.
    """
    collator = CLPLCollator(
        tokenizer=tokenizer, query_max_len=32, passage_max_len=64, padding=True, return_tensors="pt", packing=True
    )
    chosen = [dataset[(0, i)] for i in examples or range(len(dataset))]
    batch = collator(chosen)
    texts = [text for example in chosen for text in example.passages]
    query = torch.zeros(len(chosen), len(texts), requires_grad=True)
    loss = CLPLLoss(1.0, 0.0, normalize=False, **options)
    ids = {name: batch[name] for name in ("passage_ids", "answer_ids", "answer_index")}
    pairs = torch.zeros(len(batch["query_ids"]) - len(chosen), len(texts))
    index = batch["negative_index"] if len(pairs) else torch.tensor([], dtype=torch.int64)
    loss(query, torch.eye(len(texts)), pairs, index, **ids).loss.backward()
    found = []
    for row, gradient in enumerate(query.grad.tolist()):
        pushed: dict[str, float] = {}
        for column, weight in enumerate(gradient):
            if weight and column != row * len(texts) // len(chosen):
                pushed[texts[column]] = pushed.get(texts[column], 0) + weight
        found.append(pushed)
    return found


@pytest.mark.parametrize("files", [1, 2])
def test_a_query_on_two_lines_has_the_answers_of_both(tmp_path, tiny_tokenizer, files):
    lines = [line("who?", "she", ["m1", "m2"]), line("Who ?", "he", ["n1", "n2"])]
    parts = [lines] if files == 1 else [lines[:1], lines[1:]]
    first, second = pushes(tiny_tokenizer, make_dataset(tmp_path, *parts))
    assert set(first) == set(second) == {"m1", "m2", "n1", "n2"}
    first, second = pushes(tiny_tokenizer, make_dataset(tmp_path, *parts, leave_out_answers=False))
    assert "he" in first
    assert "she" in second


def test_answers_of_lines_that_are_not_trained_on_count(tmp_path, tiny_tokenizer):
    lines = [line(f"q{i}", f"p{i}", [f"p{i + 10}", "m"]) for i in range(10)]
    known = [line(f"q{i}", f"p{i + 10}", ["m"]) for i in range(10)]
    dataset = make_dataset(tmp_path, lines + known, max_example_num_per_dataset=3)
    assert len(dataset) == 3
    assert dataset.left_out == sum(int(dataset.dataset[i]["pos"][0][1:]) < 10 for i in range(3))
    for pushed, number in zip(pushes(tiny_tokenizer, dataset), range(3)):
        query = dataset.dataset[number]["query"]
        assert not {f"p{query[1:]}", f"p{int(query[1:]) + 10}"} & set(pushed)


def test_a_positive_among_the_negatives_is_none(tmp_path, tiny_tokenizer):
    dataset = make_dataset(
        tmp_path, [line("q", ["a", "b"], ["b", "c"]), line("r", "d", ["e", "f"])], train_group_size=2
    )
    drawn = {dataset[(epoch, 0)].passages[0] for epoch in range(20)}
    assert drawn == {"a", "b"}
    for epoch in range(20):
        example = dataset[(epoch, 0)]
        assert example.passages[1] == "c"
    first, _ = pushes(tiny_tokenizer, dataset)
    assert not {"a", "b"} & set(first)
    assert "c" in first
    assert dataset.left_out == 1


def test_what_a_negatives_queries_say_counts(tmp_path, tiny_tokenizer):
    """A passage that is the negative of one query answers another, of the same batch."""
    lines = [line("q", "a", ["b", "c"], [None, ["r"]]), line("r", "d", ["e", "f"])]
    first, second = pushes(tiny_tokenizer, make_dataset(tmp_path, lines))
    assert set(first) == {"b", "c", "d", "e", "f"}
    assert set(second) == {"a", "b", "e", "f"}


def test_a_passage_that_is_the_query_is_no_negative(tmp_path, tiny_tokenizer):
    lines = [line("one", "two", ["m"]), line("two", "one", ["One.", "n"])]
    dataset = make_dataset(tmp_path, lines)
    first, second = pushes(tiny_tokenizer, dataset)
    assert set(first) == set(second) == {"m", "n"}


@pytest.mark.parametrize(
    ("positive", "copy"),
    [
        ("하나 둘", "\u1112\u1161\u1102\u1161 \u1103\u116e\u11af"),
        ("one two", "one \n two"),
        ("می\u200cشود", "می شود"),
        ("کتاب یک", "\u0643تاب \u064a\u0643"),
        ("سال ۱۳۹۵", "سال ١٣٩٥"),
        ("سال ۱۳۹۵", "سال 1395"),
        ("سلام", "ســلام"),
        ("क़लम", "\u0958लम"),
    ],
)
def test_a_copy_in_other_bytes_is_no_negative(tmp_path, tiny_tokenizer, positive, copy):
    """Neither of its own query, nor of another line's query that it answers, and it draws no gradient at all from it."""
    lines = [line("q", positive, [copy, "m"]), line("r", "p", [copy, "n"]), line("s", copy, ["o"])]
    dataset = make_dataset(tmp_path, lines)
    first, second, third = pushes(tiny_tokenizer, dataset)
    assert not {positive, copy} & set(first)
    assert not {positive, copy} & set(third)
    assert copy in second
    assert dataset[(0, 0)].passages[0] == positive  # texts stay as they are
    assert dataset.left_out == 1


@pytest.mark.parametrize("in_batch", [True, False])
def test_few_negatives_come_once(tmp_path, tiny_tokenizer, in_batch):
    """Each has the weight of any other negative, for its own query and for others."""
    lines = [line("q", "a", ["b", "b.", "B"]), line("r", "c", ["d", "e", "f", "g"]), line("s", "h", ["h"])]
    dataset = make_dataset(tmp_path, lines, train_group_size=5)
    assert (dataset.small_groups, dataset.left_out) == (2, 3)
    assert [len(dataset[(0, i)].passages) for i in range(3)] == [5, 5, 5]
    assert dataset[(0, 0)].ids.passages[2:] == [-1, -1, -1]
    first, second, third = pushes(tiny_tokenizer, dataset, in_batch_negatives=in_batch)
    if in_batch:
        assert set(first) == {"b", "c", "d", "e", "f", "g", "h"}
        assert len(set(first.values())) == len(set(second.values())) == 1
        assert first["b"] == pytest.approx(1 / 8 / 3)
    else:
        assert first == {"b": pytest.approx(1 / 2 / 3)}
        assert set(second) == {"d", "e", "f", "g"}
        assert third == {}


def test_the_plan_says_what_is_left_out(tiny_encoder, tmp_path, capsys):
    write_jsonl(tmp_path / "t.jsonl", [line("q", ["a", "b"], ["b", "c"]), *make_triplets(3, negatives=4)])
    main([*arguments(tiny_encoder, tmp_path / "t.jsonl", tmp_path / "run"), "--dry_run", "true"])
    out = capsys.readouterr().out
    assert "negatives       1 left out: known to answer their query, or there twice" in out
    assert "negatives       too few for the group of 1 examples, which stays smaller" in out


def test_repeated_negatives_bring_their_queries_once(tmp_path):
    dataset = make_dataset(
        tmp_path, [line("q", "a", ["b"], [["r", "s", "t"]])], train_group_size=5, queries_per_negative=2
    )
    example = dataset[(0, 0)]
    assert [len(queries) for queries in example.negative_queries] == [2, 0, 0, 0]
    assert example.ids.negative_queries[1:] == [[], [], []]


def test_teachers_give_nothing_to_what_fills_a_group(tmp_path):
    record = line("q", ["a", "b"], ["b", "c"]) | {"pos_scores": [2, 1], "neg_scores": [1, 0.5]}
    example = make_dataset(tmp_path, [record], knowledge_distillation=True, train_group_size=4)[(0, 0)]
    assert example.passages[1] == "c"
    assert example.teacher_scores[1:] == [0.5, -float("inf"), -float("inf")]


@pytest.mark.parametrize("kind", ["kl_div", "m3_kd_loss"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("unified", [True, False])
def test_distillation_and_joint_losses_leave_them_out(tiny_encoder, tmp_path, kind, own, unified):
    """Of a run with a teacher: a passage that answers a query, or fills up its group, changes nothing in the scores."""
    scores = {"pos_scores": [2], "neg_scores": [1]}
    lines = [line("abc", "she", ["m"]) | scores, line("abc", "he", ["n"]) | scores]
    path = tmp_path / f"t{'_no_in_batch_neg' * own}.jsonl"
    write_jsonl(path, lines)
    options = {
        "knowledge_distillation": True,
        "kd_loss_type": kind,
        "unified_finetuning": unified,
        "train_group_size": 4,
    }
    runner = make_runner(
        arguments(tiny_encoder, path, tmp_path / "run", num_experts=0, trainable="full", packing=False, **options)
    )
    batch = runner.trainer.data_collator([runner.data.dataset[(0, i)] for i in range(2)])
    model = runner.model.train()
    output = model(**batch)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    (mask,) = model.no_negatives
    assert mask.tolist() == [
        [False, False, True, True, True, False, True, True],
        [True, False, True, True, False, False, True, True],
    ]
    assert (model.compute_dense_score(torch.ones(2, 3), torch.ones(8, 3))[mask] == -1e4).all()


def guided(record, positives, negatives):
    return record | {"pos_guide_scores": positives, "neg_guide_scores": negatives}


@pytest.mark.parametrize("in_batch", [True, False])
def test_what_a_guide_scores_above_the_positive_gets_no_gradient(tmp_path, tiny_tokenizer, in_batch):
    """Wherever in the batch it stands; another query goes on to push it."""
    lines = [
        guided(line("q", "a", ["high", "equal", "low"]), [0.5], [0.6, 0.5, 0.1]),
        guided(line("r", "HIGH", ["n", "low"]), [0.5], [0.9, 0.9]),
        line("s", "b", ["high", "o"]),  # without scores
    ]
    options = {"in_batch_negatives": in_batch}
    dataset = make_dataset(tmp_path, lines, train_group_size=4, guide_margin=0)
    assert dataset.left_out_by_guide == 3
    first, second, third = pushes(tiny_tokenizer, dataset, **options)
    own = ({"equal", "low"}, set(), {"high", "o"})
    others = ({"b", "o"}, {"a", "equal", "b", "o"}, {"a", "equal", "low", "HIGH"})
    for pushed, expected, in_others in zip((first, second, third), own, others):
        assert set(pushed) == expected | (in_others if in_batch else set())
    stricter = make_dataset(tmp_path, lines, train_group_size=4, guide_margin=0.2)
    assert "equal" not in pushes(tiny_tokenizer, stricter, **options)[0]
    off = make_dataset(tmp_path, lines, train_group_size=4)
    assert off.left_out_by_guide == 0
    assert "high" in pushes(tiny_tokenizer, off, **options)[0]


def test_the_guide_judges_by_the_positive_that_is_drawn(tmp_path):
    dataset = make_dataset(
        tmp_path, [guided(line("q", ["a", "b"], ["c", "d", "e"]), [0.2, 0.8], [0.1, 0.5, 0.9])], guide_margin=0
    )
    assert dataset.left_out_by_guide == 1
    seen = {"a": set(), "b": set()}
    for epoch in range(30):
        example = dataset[(epoch, 0)]
        kept = [text for text, number in zip(example.passages, example.ids.passages) if number != -1]
        seen[kept[0]].update(kept[1:])
    assert seen == {"a": {"c"}, "b": {"c", "d"}}


def test_a_teachers_scores_stand_in_for_a_guides(tmp_path):
    record = line("q", "a", ["c", "d"]) | {"pos_scores": [2], "neg_scores": [3, -1]}
    example = make_dataset(tmp_path, [record], guide_margin=0)[(0, 0)]
    assert example.passages[1] == "d"
    assert example.ids.passages[2] == -1


def test_a_guides_margin_needs_scores_and_a_mask(tiny_encoder, tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    write_jsonl(path, [guided(line(f"q{i}", f"a{i}", [f"b{i}", f"c{i}"]), [0.5], [0.6, 0.1]) for i in range(4)])
    argv = [*arguments(tiny_encoder, path, tmp_path / "run"), "--dry_run", "true", "--guide_margin", "0"]
    main(argv)
    assert "negatives       4 left out by the guide, with every positive of their query" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*argv, "--mask_duplicates", "false"])
    assert "guide_margin leaves out negatives as mask_duplicates does" in capsys.readouterr().err
    write_jsonl(path, [line(f"q{i}", f"a{i}", [f"b{i}"]) for i in range(4)])
    with pytest.raises(SystemExit):
        main(argv)
    assert "guide_margin: no line of train_data has scores of a guide" in capsys.readouterr().err


def test_known_answers():
    queries, answers = torch.tensor([3, 1, 3, 3, 2]).numpy(), torch.tensor([9, 8, 7, 9, 6]).numpy()
    known = KnownAnswers([(queries[:2], answers[:2]), (queries[2:], answers[2:])])
    assert [known.of(query).tolist() for query in (0, 1, 2, 3, 4)] == [[], [8], [6], [7, 9], []]
    assert known.hold((torch.tensor([3, 3, 1]).numpy(), torch.tensor([7, 8, 8]).numpy())).tolist() == [
        True,
        False,
        True,
    ]
    known.forget_single()
    assert [known.of(query).tolist() for query in (1, 2, 3)] == [[], [], [7, 9]]


def test_distinct_batches(tiny_encoder, tmp_path):
    """A run of before, whose config does not name the option, goes on without it only."""
    lines = [line(f"q{i // 4}", f"p{i}", ["m", "n"]) for i in range(12)]
    write_jsonl(tmp_path / "t.jsonl", lines)
    batches = {}
    for wanted in (True, False):
        argv = arguments(tiny_encoder, tmp_path / "t.jsonl", tmp_path / "run", distinct_batches=wanted)
        batches[wanted] = [[i for _, i in batch] for batch in make_runner(argv).data.batches]
    assert all(len({i // 4 for i in batch}) == 2 for batch in batches[True])
    assert not all(len({i // 4 for i in batch}) == 2 for batch in batches[False])
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "train_config.yaml").write_text("seed: 42\n")
    check_same_run({"seed": 42, "distinct_batches": False}, checkpoint)
    with pytest.raises(UserError, match="distinct_batches is True, but the run to resume has False"):
        check_same_run({"seed": 42, "distinct_batches": True}, checkpoint)
