"""Uses the sweeper in a program without BatchNorm: gradient descent in a valley.

python main.py lr=0.1                                  # one run
python main.py -m                                      # the sweep of conf/config.yaml
python main.py -m hydra.sweeper.n_jobs=2               # with two workers; run again to continue
python main.py -m hydra/sweeper/sampler=random hydra.sweeper.study_name=random
"""

import hydra
from hydra_plugins.bn_optuna import register
from omegaconf import DictConfig

register()  # Hydra does not find the plugin itself if bn_lightning is an editable install


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(config: DictConfig) -> dict[str, float | bool]:
    """Descend f(x, y) = x^2 + 20 y^2 from (10, 1). A run that leaves the valley has diverged."""
    position, velocity = [10.0, 1.0], [0.0, 0.0]
    slopes = (2.0, 40.0)
    for _ in range(config.steps):
        for i, slope in enumerate(slopes):
            velocity[i] = config.momentum * velocity[i] - config.lr * slope * position[i]
            position[i] += velocity[i]
        if abs(position[0]) + abs(position[1]) > 1e6:
            # A result with the height of the start, so that the map of the sweep has no gap.
            return {"height": 120.0, "diverged": True}
    return {"height": position[0] ** 2 + 20 * position[1] ** 2, "diverged": False}


if __name__ == "__main__":
    main()
