package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// memBlobs are NARs in memory.
type memBlobs map[nixproto.Hash][]byte

func (b memBlobs) Open(_ context.Context, h nixproto.Hash) (Blob, error) {
	data, ok := b[h]
	if !ok {
		return nil, errors.New("no such blob")
	}
	return memBlob{bytes.NewReader(data), nil}, nil
}

// A memBlob fails to be read with err unless that is nil.
type memBlob struct {
	*bytes.Reader
	err error
}

func (b memBlob) Close() error { return nil }
func (b memBlob) Size() int64  { return b.Reader.Size() }
func (b memBlob) Index() (nar.Index, error) {
	x, _, err := nar.ReadIndex(io.NewSectionReader(b.Reader, 0, b.Reader.Size()))
	return x, err
}
func (b memBlob) ReadAt(p []byte, off int64) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	return b.Reader.ReadAt(p, off)
}

// brokenBlobs has blobs that cannot be read.
type brokenBlobs struct{ memBlobs }

func (b brokenBlobs) Open(ctx context.Context, h nixproto.Hash) (Blob, error) {
	blob, err := b.memBlobs.Open(ctx, h)
	if err != nil {
		return nil, err
	}
	m := blob.(memBlob)
	m.err = errors.New("the host's disk is broken")
	return m, nil
}

// memOutputs keeps outputs in memory.
type memOutputs struct {
	mu   sync.Mutex
	nars map[string]*bytes.Buffer
	ends []string
	fail error // of every write
}

func (o *memOutputs) Create(_ context.Context, name string) (OutputWriter, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.nars == nil {
		o.nars = map[string]*bytes.Buffer{}
	}
	o.nars[name] = new(bytes.Buffer)
	return &memOutput{o, name}, nil
}

type memOutput struct {
	o    *memOutputs
	name string
}

func (w *memOutput) Write(p []byte) (int, error) {
	w.o.mu.Lock()
	defer w.o.mu.Unlock()
	if w.o.fail != nil {
		return 0, w.o.fail
	}
	return w.o.nars[w.name].Write(p)
}

func (w *memOutput) Close() error { w.end("closed"); return nil }
func (w *memOutput) Abort()       { w.end("aborted") }
func (w *memOutput) end(how string) {
	w.o.mu.Lock()
	defer w.o.mu.Unlock()
	w.o.ends = append(w.o.ends, w.name+" "+how)
}

const testHash = "0123456789abcdfghijklmnpqrsvwxyz"

func testPath(name string) nixproto.StorePath {
	return nixproto.StorePath(nixproto.StoreDir + "/" + testHash + "-" + name)
}

// shellSpec is a build whose builder is a shell script. Its input is in $in.
func shellSpec(id, script string, blobs memBlobs, input *tree, t testing.TB) *Spec {
	archive := input.archive(t)
	hash := nixproto.SumSHA256(archive)
	blobs[hash] = archive
	in := testPath("input")
	out := testPath(id)
	return &Spec{
		BuildID: id, DrvPath: testPath(id + ".drv"),
		Drv: &nixproto.Derivation{
			Name: id, System: "x86_64-linux", Builder: "/bin/sh", Args: []string{"-c", script},
			Env:       map[string]string{"in": string(in), "out": string(out)},
			InputSrcs: []nixproto.StorePath{in},
			Outputs:   map[string]nixproto.DerivationOutput{"out": {Path: out}},
		},
		Inputs:  []nixproto.PathInfo{{Path: in, NarHash: hash, NarSize: uint64(len(archive))}},
		Outputs: []Output{{Name: "out", Path: out}},
		Cores:   2, MemoryMiB: 512, ScratchMiB: 1024,
	}
}

// guestPIDs returns the process ids of the QEMUs that this process has.
func guestPIDs(t testing.TB) []int {
	dirs, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Error(err)
	}
	var pids []int
	for _, d := range dirs {
		stat, err := os.ReadFile(d)
		if err != nil || !bytes.Contains(stat, []byte("(qemu-system")) {
			continue
		}
		var pid, parent int
		var name, state string
		if _, err := fmt.Sscan(string(stat), &pid, &name, &state, &parent); err == nil && parent == os.Getpid() && state != "Z" {
			pids = append(pids, pid)
		}
	}
	return pids
}

// guestProcesses returns how many QEMUs this process has.
func guestProcesses(t testing.TB) int { return len(guestPIDs(t)) }

func TestRun(t *testing.T) {
	blobs := memBlobs{}
	input := dir(map[string]*tree{"greeting": file("hello from the input\n"), "run": program("#!/bin/sh\necho it runs\n")})
	r := newTestRunner(t, blobs, nil)
	spec := func(id, script string) *Spec { return shellSpec(id, script, blobs, input, t) }
	run := func(t *testing.T, s *Spec) (*Result, string, *memOutputs, error) {
		t.Helper()
		var log bytes.Buffer
		outs := new(memOutputs)
		ctx, stop := context.WithTimeout(t.Context(), 5*time.Minute)
		defer stop()
		res, err := r.Run(ctx, s, &log, outs)
		if n := guestProcesses(t); n != 0 {
			t.Errorf("%d guests are left", n)
		}
		return res, log.String(), outs, err
	}
	warmUp(t, r, spec("warm", "true"))
	failure := func(t *testing.T, err error, kind Kind) *BuildError {
		t.Helper()
		var failed *BuildError
		if !errors.As(err, &failed) || failed.Kind != kind {
			t.Fatalf("got %v, want %v", err, kind)
		}
		if failed.Result.Start.IsZero() || failed.Result.Stop.Before(failed.Result.Start) || len(failed.Result.Produced) > 0 {
			t.Errorf("result %+v", failed.Result)
		}
		return failed
	}

	t.Run("success", func(t *testing.T) {
		s := spec("success", "cat $in/greeting; $in/run; echo made > $out; mkdir $dev; echo more > $dev/file; nproc")
		s.Outputs = append(s.Outputs, Output{Name: "dev", Path: testPath("success-dev")})
		s.Drv.Outputs["dev"] = nixproto.DerivationOutput{Path: testPath("success-dev")}
		s.Drv.Env["dev"] = string(testPath("success-dev"))
		before := time.Now()
		res, log, outs, err := run(t, s)
		if err != nil {
			t.Fatal(err)
		}
		if want := "hello from the input\nit runs\n2\n"; log != want {
			t.Errorf("log %q, want %q", log, want)
		}
		if strings.Join(res.Produced, " ") != "out dev" || strings.Join(outs.ends, ", ") != "out closed, dev closed" {
			t.Errorf("produced %q, %q", res.Produced, outs.ends)
		}
		for i, want := range []*tree{file("made\n"), dir(map[string]*tree{"file": file("more\n")})} {
			got := outs.nars[res.Produced[i]].Bytes()
			if !bytes.Equal(got, want.archive(t)) {
				t.Errorf("output %s is %q", res.Produced[i], got)
			}
		}
		if !res.Restored {
			t.Error("the guest was not restored from a template")
		}
		if res.Booted.Before(before) || res.Start.Before(res.Booted) || res.Stop.Before(res.Start) || res.CPUUser+res.CPUSystem <= 0 || res.PeakMemory <= 0 {
			t.Errorf("result %+v", res)
		}
	})
	t.Run("failure", func(t *testing.T) {
		_, log, _, err := run(t, spec("failure", "echo about to fail; exit 7"))
		if failed := failure(t, err, Failed); failed.ExitStatus != 7 {
			t.Errorf("status %d", failed.ExitStatus)
		}
		if log != "about to fail\n" {
			t.Errorf("log %q", log)
		}
	})
	t.Run("signal", func(t *testing.T) {
		// As the first process of its namespace a builder only dies of signals
		// that come from outside, or of its own faults.
		_, _, _, err := run(t, spec("signal", "sh -c 'kill -9 $$'; exit $?"))
		if failed := failure(t, err, Failed); failed.ExitStatus != 128+9 {
			t.Errorf("status %d", failed.ExitStatus)
		}
	})
	t.Run("output missing", func(t *testing.T) {
		_, _, outs, err := run(t, spec("missing", "true"))
		failure(t, err, OutputMissing)
		if len(outs.ends) > 0 {
			t.Errorf("outputs: %q", outs.ends)
		}
	})
	t.Run("timeout", func(t *testing.T) {
		s := spec("timeout", "while true; do echo busy; sleep 0.1; done")
		s.Timeout, s.MaxSilent = 2*time.Second, time.Hour
		_, log, _, err := run(t, s)
		failed := failure(t, err, TimedOut)
		if took := failed.Result.Stop.Sub(failed.Result.Start); took < 2*time.Second || took > 20*time.Second {
			t.Errorf("took %v", took)
		}
		if !strings.HasPrefix(log, "busy\n") {
			t.Errorf("log %q", log)
		}
	})
	t.Run("silence", func(t *testing.T) {
		s := spec("silence", "echo once; sleep 1000")
		s.MaxSilent = 2 * time.Second
		_, log, _, err := run(t, s)
		failure(t, err, Silent)
		if log != "once\n" {
			t.Errorf("log %q", log)
		}
	})
	t.Run("log limit", func(t *testing.T) {
		s := spec("loglimit", "while true; do echo 0123456789; done")
		s.MaxLog = 10000
		_, log, _, err := run(t, s)
		failure(t, err, LogLimit)
		if len(log) != 10000 {
			t.Errorf("%d bytes of log", len(log))
		}
	})
	t.Run("out of memory", func(t *testing.T) {
		s := spec("oom", "x=0123456789; while true; do x=$x$x; done; exit 0")
		s.MemoryMiB = 128
		_, _, _, err := run(t, s)
		failure(t, err, OutOfMemory)
	})
	t.Run("no space", func(t *testing.T) {
		s := spec("nospace", "fallocate -l 2000000000 /build/big; echo done with $?; sleep 2; rm /build/big; exit 1")
		s.ScratchMiB, s.MemoryMiB = 64, 512
		_, _, _, err := run(t, s)
		if peak := failure(t, err, NoSpace).Result.PeakScratch; peak < 900<<20 || peak > 1<<30 {
			t.Errorf("a peak of %d bytes", peak)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("the client went away")
		log := writerFunc(func(p []byte) (int, error) { cancel(why); return len(p), nil })
		_, err := r.Run(ctx, spec("cancelled", "echo go; sleep 1000"), log, new(memOutputs))
		if !errors.Is(err, why) {
			t.Errorf("got %v", err)
		}
		if n := guestProcesses(t); n != 0 {
			t.Errorf("%d guests are left", n)
		}
	})
	t.Run("guest dies", func(t *testing.T) {
		log := writerFunc(func(p []byte) (int, error) { killGuests(t); return len(p), nil })
		_, err := r.Run(t.Context(), spec("dies", "echo go; sleep 1000"), log, new(memOutputs))
		var failed *BuildError
		if err == nil || errors.As(err, &failed) || !strings.Contains(err.Error(), "killed") {
			t.Errorf("got %v, want our failure", err)
		}
	})
	t.Run("log cannot be kept", func(t *testing.T) {
		log := writerFunc(func(p []byte) (int, error) { return 0, syscall.ENOSPC })
		_, err := r.Run(t.Context(), spec("lostlog", "echo go; sleep 1000"), log, new(memOutputs))
		var failed *BuildError
		if !errors.Is(err, syscall.ENOSPC) || errors.As(err, &failed) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("output cannot be kept", func(t *testing.T) {
		_, err := r.Run(t.Context(), spec("lostout", "echo x > $out"), io.Discard, &memOutputs{fail: syscall.ENOSPC})
		var failed *BuildError
		if !errors.Is(err, syscall.ENOSPC) || errors.As(err, &failed) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("output is refused", func(t *testing.T) {
		_, err := r.Run(t.Context(), spec("badout", "echo x > $out"), io.Discard, &memOutputs{fail: &OutputError{errors.New("bad NAR")}})
		failure(t, err, OutputRefused)
	})
	t.Run("input is missing", func(t *testing.T) {
		s := spec("noinput", "true")
		s.Inputs[0].NarHash = nixproto.SumSHA256([]byte("nowhere"))
		_, _, _, err := run(t, s)
		var failed *BuildError
		if err == nil || errors.As(err, &failed) || !strings.Contains(err.Error(), "no such blob") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("bad specs", func(t *testing.T) {
		for _, change := range []func(*Spec){
			func(s *Spec) { s.BuildID = "../x" },
			func(s *Spec) { s.Drv = nil },
			func(s *Spec) { s.Outputs = nil },
			func(s *Spec) { s.Cores = 0 },
			func(s *Spec) { s.Cores = 1000 },
			func(s *Spec) { s.Timeout = -1 },
		} {
			s := spec("bad", "true")
			change(s)
			if _, _, _, err := run(t, s); err == nil {
				t.Errorf("%+v is taken", s)
			}
		}
	})
	t.Run("several at once", func(t *testing.T) {
		var wg sync.WaitGroup
		uuids := make([]string, 3)
		var specs []*Spec
		for i := range uuids {
			specs = append(specs, spec(fmt.Sprintf("many%d", i), "cat /proc/sys/kernel/random/uuid; date +%s; echo $in > $out"))
		}
		for i, s := range specs {
			wg.Go(func() {
				var log bytes.Buffer
				if _, err := r.Run(t.Context(), s, &log, new(memOutputs)); err != nil {
					t.Error(err)
					return
				}
				uuid, date, _ := strings.Cut(log.String(), "\n")
				uuids[i] = uuid
				var when int64
				if _, err := fmt.Sscan(date, &when); err != nil || time.Since(time.Unix(when, 0)).Abs() > time.Minute {
					t.Errorf("the guest's clock says %q: %v", date, err)
				}
			})
		}
		wg.Wait()
		// Clones of one template share no randomness.
		if uuids[0] == uuids[1] || uuids[1] == uuids[2] || uuids[0] == uuids[2] {
			t.Errorf("twins: %q", uuids)
		}
	})
	t.Run("broken template", func(t *testing.T) {
		for _, s := range r.templates.byID {
			bad, err := memfd("bad", 0)
			if err != nil {
				t.Fatal(err)
			}
			bad.WriteString("this is no saved guest")
			s.template.state.Close()
			s.template.state = bad
		}
		res, err := r.Run(t.Context(), spec("dropped", "echo x > $out"), io.Discard, new(memOutputs))
		if err != nil {
			t.Fatal(err)
		}
		if res.Restored {
			t.Error("restored from a broken template")
		}
		warmUp(t, r, spec("warm", "true"))
		if res, _, _, err = run(t, spec("again", "echo x > $out")); err != nil || !res.Restored {
			t.Errorf("the template was not made again: %v", err)
		}
	})
	t.Run("status", func(t *testing.T) {
		s := r.Status()
		generation, err := r.Generation(t.Context(), "x86_64-linux")
		if err != nil || s.Accel != "tcg" || s.WhyNotKVM == "" || s.Templates == 0 || s.Guests != 0 || s.Generation == "" || s.Generation != generation {
			t.Errorf("%+v", s)
		}
	})
	t.Run("closed", func(t *testing.T) {
		log := writerFunc(func(p []byte) (int, error) { go r.Close(); return len(p), nil })
		if _, err := r.Run(t.Context(), spec("closing", "echo go; sleep 1000"), log, new(memOutputs)); !errors.Is(err, ErrClosed) {
			t.Errorf("while it closes: %v", err)
		}
		if _, err := r.Run(t.Context(), spec("closed", "true"), io.Discard, new(memOutputs)); !errors.Is(err, ErrClosed) {
			t.Errorf("when it is closed: %v", err)
		}
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// killGuests kills this process's QEMUs, as the kernel does when memory is
// short.
func killGuests(t *testing.T) {
	for _, pid := range guestPIDs(t) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// Without templates guests boot from cold. A build has as many processors as it
// is told.
func TestRunCold(t *testing.T) {
	blobs := memBlobs{}
	r := newTestRunner(t, blobs, func(c *Config) { c.ColdBoot = true })
	outs := new(memOutputs)
	s := shellSpec("cold", "cat $in > $out; nproc; taskset -p f 1 2>&1; nproc", blobs, file("contents\n"), t)
	s.Cores = 3 // of a machine that has four
	var log bytes.Buffer
	res, err := r.Run(t.Context(), s, &log, outs)
	if err != nil {
		t.Fatal(err)
	}
	// Nor can the builder take more for itself.
	if lines := strings.Split(log.String(), "\n"); lines[0] != "3" || lines[len(lines)-2] != "3" {
		t.Errorf("a build with 3 cores has %q", log.String())
	}
	if res.Restored || !bytes.Equal(outs.nars["out"].Bytes(), file("contents\n").archive(t)) {
		t.Errorf("%+v, %q", res, outs.nars["out"])
	}
}

// An input that cannot be read is our failure, whatever the builder makes of it.
func TestRunInputBreaks(t *testing.T) {
	blobs := memBlobs{}
	r := newTestRunner(t, brokenBlobs{blobs}, func(c *Config) { c.ColdBoot = true })
	s := shellSpec("broken", "cat $in || exit 1", blobs, file(strings.Repeat("contents\n", 10000)), t)
	_, err := r.Run(t.Context(), s, io.Discard, new(memOutputs))
	var failed *BuildError
	if err == nil || errors.As(err, &failed) || !strings.Contains(err.Error(), "the host's disk is broken") {
		t.Errorf("got %v", err)
	}
}

// Whether this machine's KVM works is found out by booting, in bounded time,
// and remembered: a second Runner knows without a guest.
func TestQualify(t *testing.T) {
	state := ownState(t)
	change := func(c *Config) { c.StateDir, c.Accel = state, "auto" }
	first := newTestRunner(t, nil, change)
	s, err := first.Qualify(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	if s.Accel == "kvm" && s.WhyNotKVM != "" || s.Accel == "tcg" && s.WhyNotKVM == "" {
		t.Errorf("%+v", s)
	}
	t.Logf("accelerator %s; why not KVM: %s", s.Accel, s.WhyNotKVM)
	second := newTestRunner(t, nil, change)
	second.native.qemu.Path = inPath(t, "false") // nothing can be booted
	second.native.stamped = second.native.stamp(&second.cfg)
	again, err := second.Qualify(t.Context(), false)
	if err != nil || again.Accel != s.Accel {
		t.Errorf("not remembered: %+v, %v", again, err)
	}
	if s.Accel == "tcg" {
		third := newTestRunner(t, nil, func(c *Config) { change(c); c.Accel = "kvm" })
		if _, err := third.Qualify(t.Context(), false); err == nil || !strings.Contains(err.Error(), "KVM is required") {
			t.Errorf("KVM by configuration: %v", err)
		}
	}
	if _, err := second.Qualify(t.Context(), true); err == nil {
		t.Error("a QEMU that does nothing qualifies")
	}
}
