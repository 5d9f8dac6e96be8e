import json
import os
import sys

from fastvlm_mlx.bench.conditions import conditions, power


def test_conditions_hold_no_path_and_no_host_name() -> None:
    text = json.dumps(conditions())
    assert os.uname().nodename not in text
    assert sys.prefix not in text


POWER = {
    "-g batt": "Now drawing from 'Battery Power'\n -InternalBattery-0 80%; discharging\n",
    "-g": "System-wide power settings:\n lowpowermode         1\n",
    "-g therm": "Note: No thermal warning level has been recorded\n\tCPU_Speed_Limit \t= 80\n",
}


def test_power_conditions_of_a_mac() -> None:
    found = power(lambda arguments: POWER[" ".join(arguments[1:])])
    assert found == {
        "source": "Battery Power",
        "low_power_mode": True,
        "thermal_warning": False,
        "speed_limit": 80,
    }
    assert set(power(lambda arguments: "").values()) == {None}
