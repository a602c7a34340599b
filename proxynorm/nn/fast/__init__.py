"""The numbers of norm_act.py, sooner or in less memory."""
