gcloud compute tpus queued-resources create fluid-10b \
  --zone=us-east5-b \
  --project=my-project \
  --accelerator-type=v6e-128 \
  --runtime-version=v2-alpha-tpuv6e \
  --node-count=2 \
  --spot
while state=$(gcloud compute tpus queued-resources describe fluid-10b \
  --zone=us-east5-b \
  --project=my-project \
  --format='value(state.state)'); do
  echo "$state"
  case $state in ACTIVE) exit 0 ;; FAILED | SUSPENDING | SUSPENDED) exit 1 ;; esac
  sleep 30
done; exit 1
gcloud compute tpus queued-resources ssh fluid-10b \
  --zone=us-east5-b \
  --project=my-project \
  --node=all \
  --worker=all \
  --command='git init --quiet fluid_jax && cd fluid_jax && git fetch --quiet --depth=1 https://github.com/you/fluid_jax.git main && git checkout --quiet --detach FETCH_HEAD && bash launch/install.sh'
gcloud compute tpus queued-resources ssh fluid-10b \
  --zone=us-east5-b \
  --project=my-project \
  --node=all \
  --worker=all \
  --command='bash fluid_jax/launch/worker.sh my-bucket runs/fluid_10b --config=fluid_10b --config.data.task=my_task --config.data.module=my_tasks --config.mesh.replica=2'
