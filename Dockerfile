# One image for every Engrid container: shards, compute workers and the command line.
FROM python:3.11-slim-bookworm

# pip's index for torch; empty: the default one. One of CPU builds leaves CUDA's libraries out.
ARG TORCH_INDEX_URL=

WORKDIR /src

# What the code needs comes in layers before the code, so that a changed line does not fetch torch again.
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} 'torch~=2.13.0'
COPY pyproject.toml ./
RUN touch README.md && pip install --no-cache-dir '.[demo]'
COPY . .
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# A new volume mounted at /shared takes this folder's owner.
RUN useradd --create-home engrid && install -d -o engrid -g engrid /shared
USER engrid
WORKDIR /shared
ENV RAY_USAGE_STATS_ENABLED=0
CMD ["engrid", "--help"]
