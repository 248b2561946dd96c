import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.train.arguments import CLPLDataArguments
from clpl_moe.train.data import check_gathering, open_data
from helpers.tiny_training import arguments, make_runner, refused, write_triplets


@pytest.fixture
def data(tmp_path):
    return write_triplets(tmp_path / "train.jsonl", 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adam_beta1": 5}, "Invalid beta parameter at index 0: 5.0"),
        ({"adam_epsilon": -1}, "Invalid epsilon value: -1.0"),
        ({"optim_args": "odd"}, "optimizer adamw_torch"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr"),
        ({"lr_scheduler_kwargs": '{"odd": 1}'}, "odd"),
    ],
)
def test_options_that_only_the_optimizer_checks(tiny_encoder, data, tmp_path, capsys, options, message):
    for dry_run in (False, True):
        err = refused(arguments(tiny_encoder, data, tmp_path / "run", dry_run=dry_run, **options), capsys)
        assert message in err
        assert err.count("error: ") == 1
        assert not (tmp_path / "run").exists()


def test_no_batches_no_training(tiny_encoder, data, tmp_path, capsys):
    """transformers saves the base model as trained."""
    argv = arguments(tiny_encoder, data, tmp_path / "run", per_device_train_batch_size=9, dataloader_drop_last=True)
    for more in ([], ["--dry_run", "true"]):
        assert "no file has the 9 examples of a batch" in refused([*argv, *more], capsys)
    assert not (tmp_path / "run").exists()


def test_processes_gather_all_or_none(tmp_path):
    args = CLPLDataArguments(train_data=["t"])
    check_gathering([True, False], args, world_size=1)
    check_gathering([True, True], args, world_size=2)
    with pytest.raises(UserError, match="set same_dataset_within_batch"):
        check_gathering([True, False], args, world_size=2)
    args.same_dataset_within_batch = True
    check_gathering([True, False], args, world_size=2)


def test_a_run_that_would_wait_for_itself_is_refused(tiny_encoder, data, tmp_path, monkeypatch):
    own = write_triplets(tmp_path / "own_no_in_batch_neg.jsonl", 8, seed=1)
    runner = make_runner(arguments(tiny_encoder, [data, own], tmp_path / "run", negatives_cross_device=True))
    monkeypatch.setattr(type(runner.training_args), "world_size", 2)
    with pytest.raises(UserError, match="set same_dataset_within_batch"):
        open_data(runner.data_args, runner.training_args)
