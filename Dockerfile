# What every machine of a cluster runs: Ray's own image, locked dependencies, this project. No data, no model, no key.
#
#   docker build -t rafce_ray:0.1.0 .
#   docker build --build-arg VARIANT=-gpu -t rafce_ray:0.1.0-gpu .
ARG VARIANT=""
FROM rayproject/ray:2.60.0-py311${VARIANT}
ARG VARIANT

# As root, so that the programs' own user cannot change what it runs.
USER 0
WORKDIR /opt/rafce

# First what changes seldom. torch's own index has builds without CUDA, a tenth of the size.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir rafce_ray rafce_drawing \
    && index="" \
    && if [ -z "${VARIANT}" ]; then index="--extra-index-url=https://download.pytorch.org/whl/cpu"; fi \
    && python -m pip install --no-cache-dir --root-user-action=ignore --constraint constraints.txt ${index:+"$index"} \
        --editable ".[serve,export,mlflow,weights]"

COPY rafce_ray rafce_ray
COPY rafce_drawing rafce_drawing
COPY tune_configs tune_configs
# What cannot run here is better known now.
RUN python -m rafce_ray.tune --help > /dev/null \
    && python -m rafce_ray.serve --help > /dev/null

# Ray's image calls it ray; Kubernetes wants the number to see that it is not root.
USER 1000:100
