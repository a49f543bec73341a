"""What is said of learnt masks."""

from distill_llm.report.learned import masks_words


def test_the_share_stands_beside_its_target():
    told = {"by": "l0", "units": {"heads": 8, "neurons": 1200}, "blocks": 4, "share": 0.534, "target": 0.5}
    told |= {"lambda_1": 1.25, "lambda_2": 30.0, "kept_closed": 0, "removed_open": 3}
    assert masks_words(told) == (
        "masks of 8 heads and 1,200 neurons and 4 whole blocks learnt by l0: 53.4% expected to stay, target 50.0%, "
        "lambda 1.25 and 30; the plan keeps 0 closed units and removes 3 open ones"
    )
