"""The test that the guide ends with: what is true of the port today is checked whenever the suite runs.

    python -m pytest test_port.py

in this folder.
"""

import port

import parity


def test_the_port_is_the_same_model():
    parity.assert_same_model(
        reference=port.make_reference,
        candidate=port.make_port,
        inputs=port.inputs,
        checks=("weights", "forward", "gradients", "optimizer", "loss_curve"),
        **port.TRAINING,
    )
