package vm

import (
	"bytes"
	"os"
	"testing"
)

// Emulated guests of another architecture have templates, too, which are kept
// and are told from the host's own.
func TestTemplateOfAArch64(t *testing.T) {
	from := os.Getenv("NBD_TEST_AARCH64")
	if from == "" {
		t.Skip("NBD_TEST_AARCH64 names no folder with a kernel and a busybox for aarch64 guests; contrib/test fetches them")
	}
	state := ownState(t)
	if _, err := Import(state, from); err != nil {
		t.Fatal(err)
	}
	agent := buildProgram(t, "nbd/vm/guest/agent", "GOARCH=arm64")
	blobs := memBlobs{}
	spec := shellSpec("aarch64", "uname -m; nproc; cat /proc/sys/kernel/random/boot_id; echo > $out", blobs, file("x"), t)
	spec.Drv.System, spec.Cores = "aarch64-linux", 1
	var said [2]string
	for i := range said {
		r := newTestRunner(t, blobs, func(c *Config) { c.StateDir, c.AgentBinary = state, agent })
		p, err := r.platform(t.Context(), r.baseOf("aarch64-linux"))
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			m, err := p.machineFor(spec)
			if err != nil {
				t.Fatal(err)
			}
			warmUpMachine(t, r, p, m)
		}
		var log bytes.Buffer
		res, err := r.Run(t.Context(), spec, &log, new(memOutputs))
		if err != nil || !res.Restored {
			t.Fatalf("%+v, %v\n%s", res, err, log.String())
		}
		said[i] = log.String()
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	if !bytes.HasPrefix([]byte(said[0]), []byte("aarch64\n1\n")) || said[0] == said[1] {
		t.Errorf("they said %q", said)
	}
}
