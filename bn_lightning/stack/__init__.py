"""Many runs as one batched model: the parameters of all members have a leading dimension K.

training.py            `train_stack`: train and test runs as one stack
stacked_classifier.py  a stack as a LightningModule, for any Trainer
stackable.py           which runs can be one stack, read from their configurations
member.py              one run of a stack, and what it leaves
seed_batches.py        the training batches of each seed
equivalence.py         compares a stack with its members before it trains
member_losses.py       losses of a training batch
loop_state.py          what a member's checkpoint holds of Lightning's loops
loss_watch.py          finds members that diverge
evaluation.py          validation and test of all members
percentiles.py         the percentile callback for all members
same_architecture.py   checks that networks can be members of one stack
network.py             a network whose forward computes all members
stacked_layers.py      layers that compute all members at once
context.py             what the layers of a stack share; dropout's random streams
optimizers.py          optimizers with the numbers of each member
"""
