#!/usr/bin/env bash
# Four studies of two course reports, each one command; their tables go to results/sweeps/.
# On two cores of an AMD Zen 5: 78 s, 122 s, 89 s, 73 s. Arguments go to every command, such as
# --data-home DIR. CIFAR-10 was at hand only as JPEG had left it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

sweep() {
    local name=$1
    shift
    python -m skcifar sweep --output "results/sweeps/$name" "$@" | tee "results/sweeps/$name.txt"
}

mkdir -p results/sweeps
plain="solver=sgd momentum=0 learning_rate=constant"

# Softmax regression on MNIST, 80/20; the report: 91.51% on the 20%, 91.81% on the test split.
sweep 003-linear-grid --data mnist --model softmax --cv 0.2 \
    --grid "learning_rate_init=0.1,0.01,0.001 weight_decay=0.1,0.01,0.001" \
    --grid "max_iter=50,100 batch_size=32,64" \
    --set "$plain alpha=0 n_iter_no_change=inf" "$@"

# 256 ReLU units with early stopping; the report: 97.56%, and 97.87% on the test split.
sweep 003-mlp --data mnist --model mlp --cv 0.2 \
    --grid "learning_rate_init=0.01,0.001 batch_size=32,64" \
    --set "$plain hidden_layer_sizes=256 early_stopping=True max_iter=200" "$@"

# Widths and rates of one hidden layer, two classes of CIFAR-10; the report: validation losses from
# .79 (5 units) to .52 (200), 12 to 15 minutes each.
sweep 001-hidden --data cifar10 --classes 0,1 --model mlp --cv 3 \
    --grid "hidden_layer_sizes=5,20,50,100,200" \
    --set "$plain learning_rate_init=0.01 max_iter=100 n_iter_no_change=inf batch_size=32" "$@"
sweep 001-lr --data cifar10 --classes 0,1 --model mlp --cv 3 \
    --grid "learning_rate_init=0.1,0.01,0.001" \
    --set "$plain hidden_layer_sizes=100 max_iter=100 n_iter_no_change=inf batch_size=32" "$@"
