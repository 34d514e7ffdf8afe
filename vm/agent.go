package vm

import (
	"bytes"
	"compress/gzip"
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
)

// agents holds the init of guests of other architectures, as far as this program
// was built with them.
//
//go:generate ../contrib/agents
//go:embed agents
var agents embed.FS

// maxAgent bounds the size of an agent, unpacked.
const maxAgent = 64 << 20

func agentFile(a *arch) string { return "agents/" + a.goarch + ".gz" }

// checkAgent returns a *MissingError if this program was built without the agent
// for an architecture.
func checkAgent(a *arch) error {
	f, err := agents.Open(agentFile(a))
	if err != nil {
		return &MissingError{
			What: "this nbd was built without the agent for " + a.name + " guests",
			Hint: "run contrib/agents before go build, or take a release for " + runtime.GOARCH,
		}
	}
	return f.Close()
}

// unpackAgent writes the agent for an architecture to a new file in dir.
func unpackAgent(dir string, a *arch) (path string, err error) {
	packed, err := agents.ReadFile(agentFile(a))
	if err != nil {
		return "", fmt.Errorf("unpack agent for %s: %w", a.name, err)
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return "", fmt.Errorf("unpack agent for %s: %w", a.name, err)
	}
	f, err := os.CreateTemp(dir, bootPrefix)
	if err != nil {
		return "", fmt.Errorf("unpack agent for %s: %w", a.name, err)
	}
	_, err = io.Copy(f, io.LimitReader(r, maxAgent))
	if err := errors.Join(err, r.Close(), f.Close()); err != nil {
		return "", errors.Join(fmt.Errorf("unpack agent for %s: %w", a.name, err), os.Remove(f.Name()))
	}
	return f.Name(), nil
}
