# Training on GPUs: docker build -t clpl-moe . && docker run --gpus all --ipc host -v "$PWD:/work" clpl-moe --config ko ...
FROM nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3-dev python3-venv git \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH TOKENIZERS_PARALLELISM=false
# torch before the sources: a change of these leaves its gigabytes in the cache. Its wheels bring their own CUDA libraries;
# the compiler of the image is for Triton and DeepSpeed.
RUN pip install --no-cache-dir "torch>=2.11" deepspeed
COPY . /src
RUN pip install --no-cache-dir /src
WORKDIR /work
# With several GPUs: docker run --entrypoint torchrun ... clpl-moe --nproc_per_node 4 -m clpl_moe.train --config ko
ENTRYPOINT ["clpl-moe", "train"]
