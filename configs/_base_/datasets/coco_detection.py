# COCO detection with the multi-scale augmentation of the published results.
# In the form of the MMDetection that is installed; the values are in ../values.
_base_ = f'../mmdet{__import__("mmdet").__version__[0]}/coco_detection.py'
