"""A probe for lies, fitted on instructed ones, and its use as a monitor of answers.

The recipe is that of Apollo Research's deception probes. The model is asked to speak as an honest or as an
untruthful person, and the same true statements are put into its mouth; a logistic probe on the states of the
statement's tokens tells the two apart. The last tokens of a statement are left out, since by then its words say
how it ends. An answer's score is the mean logit over its tokens, and the threshold is the 99th percentile over
answers that are known to be harmless.

Such a probe can be nothing but a detector of the words "untruthful person". So everything is tested beside a bag
of the same words, under instructions in other words, and on true and false statements without any instruction.
"""

from demur.explain.honesty.fitting import Fitted, Statement, fit_monitor, load_statements
from demur.explain.honesty.monitor import HonestyMonitor, steering_curve
from demur.explain.honesty.states import mean_states, reply_states

__all__ = [
    "Fitted",
    "HonestyMonitor",
    "Statement",
    "fit_monitor",
    "load_statements",
    "mean_states",
    "reply_states",
    "steering_curve",
]
