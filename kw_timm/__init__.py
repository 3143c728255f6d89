"""KernelWarehouse networks for timm: ``import kw_timm; timm.create_model('kw4x_resnet50')``."""

from . import models
from .counting import count_mult_adds, flop_hooks
from .derive import derive_plan
from .inference import mixing_work, optimization_report, optimize_for_inference
from .kernelize import WarehousePlan, kernelize
from .plan_json import plan_from_json, plan_to_json
from .plan_table import PlanTable, plan_table
from .plans import PlanSizes, plan_sizes
from .temperature import TemperatureSchedule, anneal, get_temperature, set_temperature
from .weights import load_checkpoint, load_static

__version__ = '0.1.0'

__all__ = [
    'PlanSizes',
    'PlanTable',
    'TemperatureSchedule',
    'WarehousePlan',
    '__version__',
    'anneal',
    'count_mult_adds',
    'derive_plan',
    'flop_hooks',
    'get_temperature',
    'kernelize',
    'load_checkpoint',
    'load_static',
    'mixing_work',
    'models',
    'optimization_report',
    'optimize_for_inference',
    'plan_from_json',
    'plan_sizes',
    'plan_table',
    'plan_to_json',
    'set_temperature',
]
