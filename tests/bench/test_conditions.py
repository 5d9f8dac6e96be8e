import json
import os
import sys
from dataclasses import replace

from fastvlm_mlx.bench.conditions import Conditions, Power, conditions, power


def test_conditions_hold_no_path_and_no_host_name() -> None:
    text = json.dumps(conditions().to_dict())
    assert os.uname().nodename not in text
    assert sys.prefix not in text


POWER = {
    "-g batt": "Now drawing from 'Battery Power'\n -InternalBattery-0 80%; discharging\n",
    "-g": "System-wide power settings:\n lowpowermode         1\n",
    "-g therm": "Note: No thermal warning level has been recorded\n\tCPU_Speed_Limit \t= 80\n",
}


def test_power_conditions_of_a_mac() -> None:
    assert power(lambda arguments: POWER[" ".join(arguments[1:])]) == Power(
        source="Battery Power", low_power_mode=True, thermal_warning=False, speed_limit=80
    )
    unknown = Power(source=None, low_power_mode=None, thermal_warning=None, speed_limit=None)
    assert power(lambda arguments: "") == unknown


def test_conditions_survive_the_way_to_json_and_back() -> None:
    here = conditions()
    on_battery = replace(here, power=power(lambda arguments: POWER[" ".join(arguments[1:])]))
    for value in (here, on_battery):
        assert Conditions.from_dict(json.loads(json.dumps(value.to_dict()))) == value
