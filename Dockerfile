# Molva with every driver. The service of one machine: docker run -p 8081:8081 -v molva:/data IMAGE
# Every dependency is a wheel with a hash, so nothing is compiled and one stage is enough.
FROM python:3.13-slim-bookworm

RUN useradd --system --uid 10001 --home-dir /data --shell /usr/sbin/nologin molva
RUN install -d -o molva -g molva /data

WORKDIR /opt/molva-source
COPY requirements/run.txt requirements/run.txt
RUN python3 -m venv /opt/molva
RUN /opt/molva/bin/pip install --no-cache-dir --require-hashes -r requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/molva/bin/pip install --no-cache-dir --no-deps --no-build-isolation .
WORKDIR /data

ENV PATH=/opt/molva/bin:/usr/local/bin:/usr/bin:/bin
ENV MOLVA_HOST=0.0.0.0
ENV MOLVA_DATA=/data
USER molva
VOLUME /data
EXPOSE 8081
# Ready means that broker and ledger answer, too. Containers without HTTP switch this off.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8081/readyz', timeout=4)"]
ENTRYPOINT ["molva"]
CMD ["up"]
