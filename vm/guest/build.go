package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"syscall"

	"nbd/vm/link"
)

// A build is the one build of a guest.
type build struct {
	order  *link.BuildOrder
	conn   *link.Conn
	log    io.Writer
	ctx    context.Context
	cancel context.CancelFunc
}

func newBuild(order *link.BuildOrder, conn *link.Conn, log io.Writer) *build {
	b := &build{order: order, conn: conn, log: log}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	return b
}

// run runs the build in the guest's own surroundings and returns its result.
func (b *build) run() *link.Result {
	r := &link.Result{}
	if err := b.inGuest(r); err != nil {
		b.judge(r, err)
	}
	return r
}

// judge says in r whose failure an error is.
func (b *build) judge(r *link.Result, err error) {
	var bad *outputError
	switch {
	case errors.As(err, &bad):
		r.Kind, r.Message = bad.kind, bad.msg
	case b.ctx.Err() != nil:
		r.Kind = link.Cancelled
	default:
		r.Kind, r.Message = link.Internal, err.Error()
	}
}

// inGuest does everything between order and result. Its error is an
// *outputError or our own failure.
func (b *build) inGuest(r *link.Result) error {
	disks, err := watchIOErrors()
	if err != nil {
		return err
	}
	if err := mountDisks(len(b.order.Inputs) > 0); err != nil {
		return err
	}
	shell := link.ShellPath
	if _, err := os.Stat(shell); errors.Is(err, os.ErrNotExist) {
		shell = ""
	} else if err != nil {
		return err
	}
	st, err := newStage(scratchDir, inputDir, shell, b.order)
	if err != nil {
		return err
	}
	// The order may have been large, and it is not needed again.
	b.order.Files = nil
	debug.FreeOSMemory()
	limit, err := memoryLimit(b.order.MemoryMiB)
	if err != nil {
		return err
	}
	group, err := newCgroup(cgroupRoot, limit, b.order.MaxProcesses)
	if err != nil {
		return err
	}
	// A build that met its limit of processes has failed, whatever it makes of
	// that: a fork bomb would go on for ever.
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	unwatch, err := group.onProcessLimit(cancel)
	if err != nil {
		return err
	}
	started := func() error { return b.conn.Send(&link.Started{}) }
	runErr := runSandbox(ctx, st, b.order, group, b.log, started, r)
	if err := errors.Join(runErr, unwatch(), b.account(r, group, disks)); err != nil {
		return err
	}
	if err := b.ctx.Err(); err != nil {
		return err
	}
	if r.Kind != link.Exited || r.ExitStatus != 0 {
		return nil
	}
	return b.sendOutputs(st)
}

// account fills in what the build has used and met.
func (b *build) account(r *link.Result, group *cgroup, disks *ioErrors) error {
	u, err := group.usage()
	if err != nil {
		return err
	}
	r.CPUUser, r.CPUSystem = u.cpuUser, u.cpuSystem
	r.PeakMemory, r.OOMKills, r.ProcessLimit = u.peakMemory, u.oomKills, u.processLimit
	if r.DiskFull, r.ScratchUsed, err = diskFull(scratchDir); err != nil {
		return err
	}
	r.IOErrors, err = disks.seen()
	return err
}

func (b *build) sendOutputs(st *stage) error {
	if err := checkOutputs(st.root(), b.order, builderUID); err != nil {
		return err
	}
	dev, err := findDisk(link.OutputSerial)
	if err != nil {
		return err
	}
	s, err := openSink(dev)
	if err != nil {
		return err
	}
	infos, err := sendOutputs(s, st.root(), b.order, builderUID)
	if err := errors.Join(err, s.close()); err != nil {
		return err
	}
	return b.conn.Send(&link.Outputs{Outputs: infos})
}

// runSandbox runs the builder in its sandbox and fills in how it ended and how
// much it said. When it returns no process of the build is left. The builder
// has ended when nobody holds its terminal any more: it is killed then, as by
// Nix. group may be nil. started is called when the builder runs.
func runSandbox(ctx context.Context, st *stage, order *link.BuildOrder, group *cgroup, log io.Writer, started func() error, r *link.Result) error {
	master, slave, err := openPTY(builderUID)
	if err != nil {
		return err
	}
	defer master.Close() // only read from
	cmd, status, err := startSandbox(st, order, group, slave)
	if status != nil {
		defer status.Close() // only read from
	}
	if err := errors.Join(err, slave.Close()); err != nil {
		if cmd != nil {
			err = errors.Join(err, endSandbox(cmd, group))
		}
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		// The process may have ended: then there is nothing to do.
		cmd.Process.Kill()
	})
	defer stop()

	logged := make(chan error, 1)
	go func() {
		var err error
		r.LogBytes, err = pump(log, master)
		logged <- err
	}()
	setupErr := awaitBuilder(status)
	if setupErr == nil {
		setupErr = started()
	}
	if setupErr != nil {
		cmd.Process.Kill() // it is about to end by itself, or of no use
	}
	logErr := <-logged
	endErr := endSandbox(cmd, group)
	if err := errors.Join(setupErr, logErr, endErr); err != nil {
		return err
	}
	ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		r.Kind, r.Signal = link.Signaled, int(ws.Signal())
	} else {
		r.Kind, r.ExitStatus = link.Exited, ws.ExitStatus()
	}
	return nil
}

// startSandbox starts the first process and tells it its plan. status ends when
// the builder is executed. cmd and status are what was made before an error.
func startSandbox(st *stage, order *link.BuildOrder, group *cgroup, slave *os.File) (cmd *exec.Cmd, status *os.File, err error) {
	planReader, planWriter, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer planWriter.Close()
	status, statusWriter, err := os.Pipe()
	if err != nil {
		return nil, nil, errors.Join(err, planReader.Close())
	}
	cmd, err = spawn(slave, planReader, statusWriter, group)
	// Their other ends must see that the process has ended.
	err = errors.Join(err, planReader.Close(), statusWriter.Close())
	if err != nil {
		return cmd, status, fmt.Errorf("start sandbox: %w", err)
	}
	err = json.NewEncoder(planWriter).Encode(&plan{
		Root: st.root(), Build: st.build(), Binds: st.binds,
		System: order.System, Builder: order.Builder, Args: order.Args, Env: order.Env,
	})
	if err != nil && !errors.Is(err, syscall.EPIPE) { // then it has ended, and says why
		return cmd, status, fmt.Errorf("start sandbox: %w", err)
	}
	return cmd, status, nil
}

// spawn starts the first process; cmd is nil if it did not start.
func spawn(slave, planReader, statusWriter *os.File, group *cgroup) (*exec.Cmd, error) {
	var dir *os.File
	if group != nil {
		var err error
		if dir, err = group.open(); err != nil {
			return nil, err
		}
		defer dir.Close() // only referred to
	}
	cmd := sandboxCommand(slave, planReader, statusWriter, dir)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return cmd, nil
}

// awaitBuilder returns when the first process has become the builder, or with
// what kept it from that.
func awaitBuilder(status io.Reader) error {
	msg, err := io.ReadAll(io.LimitReader(status, 4096))
	if err != nil {
		return fmt.Errorf("start sandbox: %w", err)
	}
	if len(msg) > 0 {
		return fmt.Errorf("start sandbox: %s", msg)
	}
	return nil
}

// endSandbox kills what is left of a build and waits for it. All of its
// processes are in the PID namespace of cmd's, which is not done before them.
func endSandbox(cmd *exec.Cmd, group *cgroup) error {
	// An error says that it has ended; its exit status is what counts.
	cmd.Process.Kill()
	var exit *exec.ExitError
	err := cmd.Wait()
	if errors.As(err, &exit) {
		err = nil
	}
	if group == nil {
		return err
	}
	return errors.Join(err, group.kill())
}
