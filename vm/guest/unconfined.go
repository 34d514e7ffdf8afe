package guest

import (
	"context"
	"errors"
	"io"
	"os/exec"

	"nbd/vm/link"
)

// runUnconfined runs a builder as root beside the agent, outside the sandbox, so
// that a test can be everything that somebody is who has broken out. Its program
// is the sandbox's shell, whatever the order says.
func runUnconfined(ctx context.Context, order *link.BuildOrder, log io.Writer, started func() error, r *link.Result) error {
	counted := &counter{w: log}
	cmd := exec.CommandContext(ctx, link.ShellPath)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", counted, counted
	cmd.Args, cmd.Env = texts(order.Args), texts(order.Env)
	if err := cmd.Start(); err != nil {
		return err
	}
	if err := started(); err != nil {
		return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		return err
	}
	r.LogBytes = counted.n
	fillEnd(r, cmd.ProcessState)
	return nil
}

// A counter counts what is written.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
