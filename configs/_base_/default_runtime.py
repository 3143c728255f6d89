_base_ = f'./mmdet{__import__("mmdet").__version__[0]}/runtime.py'
custom_imports = dict(imports=['kw_mmdet'], allow_failed_imports=False)
custom_hooks = [dict(type='NumClassCheckHook')]
log_level = 'INFO'
load_from = None
