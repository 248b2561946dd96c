from clpl_moe.evaluate.labels import model_labels


def test_labels():
    assert model_labels(["runs/a", "runs/b"]) == ["a", "b"]
    assert model_labels(["x/best", "y/best", "hub/other"]) == ["x_best", "y_best", "hub_other"]
    assert model_labels(["same", "same"]) == ["same_1", "same_2"]
    assert model_labels(["/"]) == ["root"]
