package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	kvmDevice = "/dev/kvm"
	// kvmDeadline is how long a guest may take to boot under KVM before KVM
	// counts as broken.
	kvmDeadline = 20 * time.Second
	// qualifiedFile is where in the state directory the answers are kept.
	qualifiedFile = "qualified.json"
	// scratchPrefix starts the names of the folders in Config.RuntimeDir.
	scratchPrefix = "scratch-"
)

// A qemu is an installed QEMU.
type qemu struct {
	Path    string
	Version string // as it tells, for example "7.2.22"
	major   int
	id      string // changes when the program does
}

// findQEMU returns the configured QEMU, or the one in PATH.
func findQEMU(ctx context.Context, configured string, a *arch) (qemu, error) {
	name := besideOrInPath(configured, a)
	path, err := exec.LookPath(name)
	if err != nil {
		return qemu{}, &MissingError{What: "QEMU was not found (" + name + ")", Hint: a.hint}
	}
	ctx, stop := context.WithTimeout(ctx, 20*time.Second)
	defer stop()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return qemu{}, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	q := qemu{Path: path}
	if q.Version, q.major, err = parseQEMUVersion(string(out)); err != nil {
		return qemu{}, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return qemu{}, fmt.Errorf("find QEMU: %w", err)
	}
	q.id = fmt.Sprintf("%s %s %d %d", path, strings.TrimSpace(string(out)), info.Size(), info.ModTime().UnixNano())
	return q, nil
}

// parseQEMUVersion reads the first line of qemu --version.
func parseQEMUVersion(text string) (version string, major int, err error) {
	rest, ok := strings.CutPrefix(text, "QEMU emulator version ")
	if !ok {
		return "", 0, fmt.Errorf("unexpected answer %.80q", text)
	}
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return "", 0, fmt.Errorf("unexpected answer %.80q", text)
	}
	first, _, _ := strings.Cut(fields[0], ".")
	if major, err = strconv.Atoi(first); err != nil {
		return "", 0, fmt.Errorf("unexpected version %.40q", fields[0])
	}
	return fields[0], major, nil
}

// A platform is what all guests of a Runner share, once it is known.
type platform struct {
	of      *base
	arch    *arch
	qemu    qemu
	kernel  Kernel
	boot    *bootFiles
	cgroups cgroupFactory // nil if there are none
	accel   string
	tscKHz  int
	// onDemand says that guests bring up processors as they need them.
	onDemand bool
	shell    string // hash of the sandbox's shell, hex
	notKVM   string // why accel is not kvm
	// noNested says why guests do not run guests; if it is "", nested is whether
	// they can, once that is known.
	noNested string
	nested   atomic.Pointer[answer]
}

// An answer is what booting a guest once has taught.
type answer struct {
	Works  bool      `json:"works"`
	Reason string    `json:"reason,omitempty"`
	When   time.Time `json:"when"`
}

// answers keeps what was learned in the state directory, by what it was learned
// of.
type answers struct {
	path string
	mu   sync.Mutex
}

// noLasts is how long it counts that something did not work. What was in its way
// may not have been what was tried.
const noLasts = 24 * time.Hour

// get returns the answer to key, if there is one that counts.
func (a *answers) get(key string) (answer, bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	all, err := a.readLocked()
	if err != nil {
		return answer{}, false, err
	}
	got, ok := all[key]
	return got, ok && (got.Works || time.Since(got.When) < noLasts), nil
}

// maxAnswers is how many answers are kept: of old kernels and QEMUs nobody asks.
const maxAnswers = 32

// put keeps an answer.
func (a *answers) put(key string, new answer) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	all, err := a.readLocked()
	if err != nil {
		return err
	}
	if len(all) >= maxAnswers {
		clear(all)
	}
	all[key] = new
	text, err := json.MarshalIndent(all, "", "\t")
	if err != nil {
		return fmt.Errorf("remember what boots: %w", err)
	}
	temp := a.path + ".new"
	if err := os.WriteFile(temp, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("remember what boots: %w", err)
	}
	if err := os.Rename(temp, a.path); err != nil {
		return fmt.Errorf("remember what boots: %w", err)
	}
	return nil
}

// readLocked reads the file; one that is damaged is as good as none.
func (a *answers) readLocked() (map[string]answer, error) {
	all := map[string]answer{}
	text, err := os.ReadFile(a.path)
	if errors.Is(err, os.ErrNotExist) {
		return all, nil
	} else if err != nil {
		return nil, fmt.Errorf("recall what boots: %w", err)
	}
	if err := json.Unmarshal(text, &all); err != nil || all == nil {
		return map[string]answer{}, nil
	}
	return all, nil
}

// platform returns what guests run on, found out on the first call: it may boot
// a guest to see whether KVM works. Callers at the same time wait for one
// another. After an error the next call tries again. Later calls look whether
// something was replaced.
func (r *Runner) platform(ctx context.Context, b *base) (*platform, error) {
	if err := b.finding.lock(ctx); err != nil {
		return nil, err
	}
	defer b.finding.unlock()
	if p := b.found.Load(); p != nil {
		return r.refresh(ctx, b, p)
	}
	p, err := r.find(ctx, b, false)
	if err != nil {
		return nil, err
	}
	b.found.Store(p)
	r.renewTemplates(p)
	return p, nil
}

// find finds out what guests run on. When fresh is true, nothing that was
// learned by booting counts.
func (r *Runner) find(ctx context.Context, b *base, fresh bool) (_ *platform, err error) {
	b, err = b.latest(ctx, &r.cfg)
	if err != nil {
		return nil, err
	}
	p := &platform{of: b, arch: b.arch, qemu: b.qemu, kernel: b.kernel, cgroups: r.cgroups}
	if p.shell, err = hashFile(b.shell); err != nil {
		return nil, fmt.Errorf("read shell of the sandbox: %w", err)
	}
	init, removeInit, err := b.initProgram(&r.cfg)
	if err != nil {
		return nil, err
	}
	p.boot, err = makeBootFiles(r.cfg.RuntimeDir, b.kernel, init, b.shell)
	if err := errors.Join(err, removeInit()); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.boot.close())
		}
	}()
	if err := r.chooseAccel(ctx, b, p, fresh); err != nil {
		return nil, err
	}
	if err := r.findNested(b, p, fresh); err != nil {
		return nil, err
	}
	r.cfg.Logger.Info("guests", "arch", b.arch.name, "accel", p.accel, "why_not_kvm", p.notKVM, "kernel", p.kernel.Name, "qemu", p.qemu.Version)
	for _, w := range p.warnings() {
		r.cfg.Logger.Warn(w)
	}
	return p, nil
}

// chooseAccel sets p's accelerator: KVM if it is wanted and a guest boots with
// it, else emulation.
func (r *Runner) chooseAccel(ctx context.Context, b *base, p *platform, fresh bool) error {
	if !b.native {
		p.accel, p.notKVM = "tcg", b.notNative()
		return nil
	}
	if r.cfg.Accel != "tcg" {
		reason, err := r.tryKVM(ctx, p, fresh)
		if err != nil {
			return err
		}
		if reason == "" {
			p.accel, p.onDemand = "kvm", true
			return nil
		}
		if r.cfg.Accel == "kvm" {
			return fmt.Errorf("KVM is required by configuration: %s", reason)
		}
		p.notKVM = reason
	} else {
		p.notKVM = "emulation was asked for by configuration"
	}
	p.accel = "tcg"
	var err error
	if p.tscKHz, err = keptFrequency(filepath.Join(r.cfg.StateDir, frequencyFile), tscFrequency()); err != nil {
		r.cfg.Logger.Warn("guest templates may be made again after a restart", "err", err)
	}
	return nil
}

// tryKVM returns why guests cannot run under KVM, "" if they can. Errors are
// the context's, or of keeping the answer.
func (r *Runner) tryKVM(ctx context.Context, p *platform, fresh bool) (reason string, err error) {
	f, err := os.OpenFile(kvmDevice, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return "this machine has no " + kvmDevice, nil
	} else if err != nil {
		return err.Error(), nil
	}
	f.Close()
	if _, err := kvmGroup(r.ids.first); err != nil {
		return err.Error(), nil
	}
	key, err := p.pairKey("kvm")
	if err != nil {
		return "", err
	}
	known, ok, err := r.answers.get(key)
	if err != nil {
		return "", err
	}
	if !ok || fresh {
		known = answer{Works: true, When: time.Now()}
		if err := r.bootOnce(ctx, p, machine{arch: p.arch, accel: "kvm"}); err != nil {
			if ctx.Err() != nil {
				return "", context.Cause(ctx)
			}
			known.Works, known.Reason = false, err.Error()
		}
		if err := r.answers.put(key, known); err != nil {
			return "", err
		}
	}
	if !known.Works {
		return "a guest was tried on " + known.When.Format(time.DateOnly) + ": " + known.Reason, nil
	}
	return "", nil
}

// pairKey names what an answer was learned of: the kernel, QEMU, the
// processor as the guest sees it, and the host's own kernel.
func (p *platform) pairKey(accel string) (string, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return strings.Join([]string{
		accel, p.arch.cpuModel(accel), cpuName(), p.boot.kernelHash, p.qemu.id, unix.ByteSliceToString(uts.Release[:]),
	}, " | "), nil
}

// bootOnce boots a small guest until its agent answers.
func (r *Runner) bootOnce(ctx context.Context, p *platform, m machine) (err error) {
	m.vcpus, m.memoryMiB, m.scratchGiB = 2, 1024, 1
	if m.accel == "kvm" {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, kvmDeadline,
			fmt.Errorf("it did not boot within %v", kvmDeadline))
		defer stop()
	}
	g, err := r.cold(ctx, p, m, emptyDisks(), wholeMachine(m))
	if err != nil {
		return err
	}
	return g.close()
}

// warnings tells what is known to be bad about what guests run on.
func (p *platform) warnings() []string {
	var w []string
	if p.accel == "tcg" && p.arch == archX8664 && p.qemu.major < 10 && compareVersions(p.kernel.Name, "6.12") >= 0 {
		w = append(w, fmt.Sprintf("guests with kernel %s were seen to crash at random under the emulation of QEMU %s: use a kernel before 6.12 (nbd kernel import) or QEMU 10",
			p.kernel.Name, p.qemu.Version))
	}
	return w
}

// generation names what can make a failing builder end differently.
func (p *platform) generation() string {
	cpu := p.arch.cpuModel(p.accel)
	if p.accel == "kvm" {
		cpu = cpuName()
	}
	return fmt.Sprintf("%d/%s/%s/sh:%.16s", Generation, p.accel, cpu, p.shell)
}

// A lock is a mutex whose waiters give up when their context ends.
type lock chan struct{}

func newLock() lock { return make(lock, 1) }

func (l lock) lock(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (l lock) unlock() { <-l }

// sweep removes what a server that was killed left in the runtime directory.
func sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("clean %s: %w", dir, err)
	}
	var errs []error
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || time.Since(info.ModTime()) < time.Minute {
			continue // gone, or another process may be at work on it
		}
		if strings.HasPrefix(e.Name(), scratchPrefix) || strings.HasPrefix(e.Name(), bootPrefix) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
