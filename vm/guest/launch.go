package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"nbd/vm/link"
)

// A sandbox is a builder to be: the first process of its namespaces, which waits
// for a plan (sandbox.go), and the terminal that it writes to. It is for one
// build.
type sandbox struct {
	group  *cgroup // may be nil
	cmd    *exec.Cmd
	master *os.File // of the terminal
	bound  int      // how many binds of the stage it has made already
	plan   *os.File // takes the plan
	status *os.File // says what went wrong; ends when the builder is executed
}

// newSandbox starts the first process, in the group unless it is nil, and
// returns when it has put together what the stage has so far and waits for its
// plan. The sandbox must be run.
func newSandbox(group *cgroup, st *stage) (_ *sandbox, err error) {
	s := &sandbox{group: group, bound: len(st.binds)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start sandbox: %w", err), s.end())
		}
	}()
	var slave, planReader, statusWriter *os.File
	if s.master, slave, err = openPTY(builderUID); err != nil {
		return nil, err
	}
	defer slave.Close() // not written to
	if planReader, s.plan, err = os.Pipe(); err != nil {
		return nil, err
	}
	defer planReader.Close()
	if s.status, statusWriter, err = os.Pipe(); err != nil {
		return nil, err
	}
	defer statusWriter.Close() // not written to
	if err := s.spawn(slave, planReader, statusWriter); err != nil {
		return nil, err
	}
	// Their other ends must see when the process has ended.
	if err := errors.Join(slave.Close(), planReader.Close(), statusWriter.Close()); err != nil {
		return nil, err
	}
	err = json.NewEncoder(s.plan).Encode(&scene{st.root(), st.build(), st.binds})
	if err != nil && !errors.Is(err, syscall.EPIPE) { // then it has ended, and says why
		return nil, err
	}
	said := make([]byte, len(statusReady))
	if _, err := io.ReadFull(s.status, said); err != nil {
		return nil, fmt.Errorf("it does not get ready: %w", err)
	}
	if string(said) != statusReady {
		rest, err := io.ReadAll(io.LimitReader(s.status, maxStatus))
		return nil, errors.Join(fmt.Errorf("%s%s", said, rest), err)
	}
	return s, nil
}

// spawn starts the first process.
func (s *sandbox) spawn(slave, planReader, statusWriter *os.File) error {
	var dir *os.File
	if s.group != nil {
		var err error
		if dir, err = s.group.open(); err != nil {
			return err
		}
		defer dir.Close() // only referred to
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close() // only handed on
	cmd := sandboxCommand(null, slave, planReader, statusWriter, dir)
	if err := cmd.Start(); err != nil {
		return err
	}
	s.cmd = cmd
	// Of what the agent protects itself with, the builder has nothing. A process
	// that sets its own score can go back to the one it had.
	score := fmt.Sprintf("/proc/%d/oom_score_adj", cmd.Process.Pid)
	if err := os.WriteFile(score, []byte("0"), 0); err != nil {
		return fmt.Errorf("reset oom score: %w", err)
	}
	return nil
}

// run runs the builder and fills in how it ended and how much it said. When it
// returns no process of the build is left. The builder has ended when nobody
// holds its terminal any more: it is killed then, as by Nix. started is called
// when the builder runs.
func (s *sandbox) run(ctx context.Context, st *stage, order *link.BuildOrder, log io.Writer, started func() error, r *link.Result) error {
	stop := context.AfterFunc(ctx, func() {
		// The process may have ended: then there is nothing to do.
		s.cmd.Process.Kill()
	})
	defer stop()
	logged := make(chan error, 1)
	go func() {
		var err error
		r.LogBytes, err = pump(log, s.master)
		logged <- err
	}()
	err := s.begin(st, order)
	if err == nil {
		err = started()
	}
	if err != nil {
		s.cmd.Process.Kill() // it is about to end by itself, or of no use
	}
	logErr := <-logged
	if err := errors.Join(err, logErr, s.end()); err != nil {
		return err
	}
	fillEnd(r, s.cmd.ProcessState)
	return nil
}

// fillEnd fills in how the builder ended.
func fillEnd(r *link.Result, state *os.ProcessState) {
	ws := state.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		r.Kind, r.Signal = link.Signaled, int(ws.Signal())
	} else {
		r.Kind, r.ExitStatus = link.Exited, ws.ExitStatus()
	}
}

// maxStatus bounds what the first process says of its failure.
const maxStatus = 4096

// begin tells the first process its plan and returns when it has become the
// builder, or with what kept it from that.
func (s *sandbox) begin(st *stage, order *link.BuildOrder) error {
	err := json.NewEncoder(s.plan).Encode(&plan{
		Binds: st.binds[s.bound:], System: order.System, Builder: order.Builder, Args: order.Args, Env: order.Env, Builtin: builtinOrder(order),
	})
	if errors.Is(err, syscall.EPIPE) { // then it has ended, and says why
		err = nil
	}
	if err := errors.Join(err, s.plan.Close()); err != nil {
		return fmt.Errorf("start sandbox: %w", err)
	}
	msg, err := io.ReadAll(io.LimitReader(s.status, maxStatus))
	if err != nil {
		return fmt.Errorf("start sandbox: %w", err)
	}
	if len(msg) > 0 {
		return fmt.Errorf("start sandbox: %s", msg)
	}
	return nil
}

// end kills what is left of the build and waits for it. All of its processes are
// in the PID namespace of the first one, which is not done before them.
func (s *sandbox) end() error {
	for _, f := range []*os.File{s.master, s.plan, s.status} {
		if f != nil {
			f.Close() // there is nothing to lose, and plan may be closed already
		}
	}
	if s.cmd == nil {
		return nil
	}
	// An error says that it has ended; its exit status is what counts.
	s.cmd.Process.Kill()
	var exit *exec.ExitError
	err := s.cmd.Wait()
	if errors.As(err, &exit) {
		err = nil
	}
	if s.group == nil {
		return err
	}
	return errors.Join(err, s.group.kill())
}
