import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from clpl_moe import Encoder
from clpl_moe.encoder.bars import no_bar_of_weights


@pytest.mark.parametrize("enabled", [True, False])
def test_no_bar_of_weights_and_the_setting_is_as_before(tiny_encoder, tmp_path, capfd, enabled):
    before = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    (transformers_logging.enable_progress_bar if enabled else transformers_logging.disable_progress_bar)()
    try:
        Encoder.load(tiny_encoder).save(tmp_path)
        assert transformers_logging.is_progress_bar_enabled() == enabled
        assert are_progress_bars_disabled() != enabled
        with no_bar_of_weights():
            assert not transformers_logging.is_progress_bar_enabled()
            assert are_progress_bars_disabled() != enabled  # downloads show theirs
    finally:
        transformers_logging.enable_progress_bar()
    assert before == (True, False)
    assert capfd.readouterr().err == ""
