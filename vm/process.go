package vm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A command says what to start as a guest's process.
type command struct {
	path string
	args []string
	// files become descriptors 3, 4, …
	files []*os.File
	// uid and gid are whom it runs as, with no other group; negative: as we do.
	uid, gid int
	// group takes the process; nil means none.
	group cgroup
	// confine is what else keeps it from the machine; nil means nothing does.
	confine *confinement
	// devices are files that a confined process may use.
	devices []string
	// output takes standard output and standard error.
	output io.Writer
}

// A process is a running command. It dies with the server (parent death
// signal), with its cgroup, or by kill.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it was reaped
	err  error         // from Wait; read after done
}

// startProcess starts c. The caller must kill the process and wait for it.
func startProcess(c command) (*process, error) {
	p := &process{cmd: exec.Command(c.path, c.args...), done: make(chan struct{})}
	p.cmd.Env = []string{}
	p.cmd.Dir = "/"
	p.cmd.ExtraFiles = c.files
	p.cmd.Stdout, p.cmd.Stderr = c.output, c.output
	// A child of the process could keep the pipe open.
	p.cmd.WaitDelay = 5 * time.Second
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		Setpgid:   true, // a terminal's interrupt is for the server alone
	}
	if c.uid >= 0 {
		p.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(c.uid), Gid: uint32(c.gid), Groups: []uint32{}}
	}
	if c.confine != nil {
		p.cmd.SysProcAttr.Cloneflags = c.confine.namespaces()
	}
	started := make(chan error)
	inThreadOfItsOwn(func() { p.run(c, started) })
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", c.path, err)
	}
	if err := p.bound(c); err != nil {
		if undead := p.stop(); undead != nil {
			return nil, fmt.Errorf("start %s: %w", c.path, errors.Join(err, undead))
		}
		return nil, fmt.Errorf("start %s: %w (%s)", c.path, err, p.exit())
	}
	return p, nil
}

// bound puts the process into its cgroup and limits it. It has only just begun,
// and its guest has not.
func (p *process) bound(c command) error {
	if c.group != nil {
		err := c.group.add(p.pid())
		if errors.Is(err, syscall.ESRCH) {
			return nil // it has ended, and says why
		}
		if err != nil {
			return err
		}
	}
	if c.confine != nil {
		return c.confine.limit(p.pid(), c.files)
	}
	return nil
}

// run starts the command and waits for it, in a thread of its own, which ends
// with it: the kernel sends the parent death signal when the thread that started
// the child ends, and Go ends threads as it likes; and the child has what
// confines the thread.
func (p *process) run(c command, started chan<- error) {
	err := c.confineThread()
	if err == nil {
		err = p.cmd.Start()
	}
	started <- err
	if err != nil {
		return
	}
	p.err = p.cmd.Wait()
	close(p.done)
}

// inThreadOfItsOwn calls f in a thread that nobody else uses before or after. It is
// never the main thread, which would not end with f, and which stands for the
// whole process: who is confined as it is may send it signals.
func inThreadOfItsOwn(f func()) {
	go func() {
		runtime.LockOSThread() // for ever
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		// While this goroutine has the main thread, another cannot get it.
		locked := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(locked)
			f()
		}()
		<-locked
		runtime.UnlockOSThread()
	}()
}

func (c *command) confineThread() error {
	if c.confine == nil {
		return nil
	}
	return c.confine.restrictThread(c.path, c.files, c.devices)
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// kill ends the process without a chance to clean up; it holds nothing worth
// keeping.
func (p *process) kill() {
	// The only error is that the process has ended.
	_ = p.cmd.Process.Kill()
}

// stopPatience is how long a killed process may take to end. It takes that long
// only if the kernel waits for a device that does not answer.
const stopPatience = time.Minute

// errUndead says that a process does not end though it was killed.
var errUndead = errors.New("QEMU does not end though it was killed")

// stop kills the process and waits until it is reaped, or errUndead.
func (p *process) stop() error { return p.stopWithin(stopPatience) }

func (p *process) stopWithin(patience time.Duration) error {
	p.kill()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-p.done:
		return nil
	case <-late.C:
		return fmt.Errorf("process %d: %w", p.pid(), errUndead)
	}
}

// exit says how the process ended, for error messages. It may be called after
// done is closed.
func (p *process) exit() string {
	var e *exec.ExitError
	switch {
	case p.err == nil:
		return "exit status 0"
	case errors.As(p.err, &e):
		return e.ProcessState.String()
	}
	return p.err.Error()
}
