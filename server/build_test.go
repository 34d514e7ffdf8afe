package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
	"nbd/vm"
)

func TestBuild(t *testing.T) {
	bt := newBuildTest(t, nil)
	lib := bt.add("lib", "a library")
	tool := bt.add("tool", "uses "+string(lib), lib)
	unused := bt.add("unused", "nothing")
	d := drv("hello", "out", "dev")
	d.InputSrcs = []nixproto.StorePath{tool, unused}
	slices.Sort(d.InputSrcs)
	d.Env["content"] = "refers to $out and " + string(lib)
	bt.runner.act("hello", func(f *fakeRun) error {
		f.say("building")
		f.say("done")
		if len(f.spec.Inputs) != 3 {
			t.Errorf("closure of %d inputs, want 3", len(f.spec.Inputs))
		}
		return f.writeContent()
	})
	req := bt.request(d)
	r, sink := bt.build(req)
	wantStatus(t, r, nixproto.Built)
	if got := sink.log(req.DrvPath); got != "building\ndone\n" {
		t.Errorf("log %q", got)
	}
	if r.StartTime != 1000 || r.StopTime != 1010 || r.CPUUser == nil || *r.CPUUser != 3_000_000 || *r.CPUSystem != 1_000_000 {
		t.Errorf("times: %+v", r)
	}
	hash, err := nixproto.NewModulo(nil).RealisationHash(d)
	if err != nil {
		t.Fatal(err)
	}
	out, dev := d.Outputs["out"].Path, d.Outputs["dev"].Path
	if want := (nixproto.Realisation{DrvHash: hash, OutputName: "dev", OutPath: dev}); r.Outputs["dev"].ID() != want.ID() || r.Outputs["dev"].OutPath != dev || len(r.Outputs) != 2 {
		t.Errorf("outputs %+v", r.Outputs)
	}

	info := bt.info(out)
	wantRefs := []nixproto.StorePath{lib, out}
	slices.Sort(wantRefs)
	if !slices.Equal(info.References, wantRefs) {
		t.Errorf("references of out: %v, want %v", info.References, wantRefs)
	}
	if info.Deriver != req.DrvPath || !info.Ultimate || info.RegistrationTime == 0 {
		t.Errorf("info of out: %+v", info)
	}
	public, err := nixproto.ParsePublicKey(bt.account.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if signers, err := info.CheckSignatures([]nixproto.PublicKey{public}); err != nil || len(signers) != 1 {
		t.Errorf("signatures %q: %v, %v", info.Signatures, signers, err)
	}
	if got := bt.info(dev).References; !slices.Equal(got, wantRefs) {
		t.Errorf("references of dev: %v", got)
	}

	records := bt.records()
	if len(records) != 1 {
		t.Fatalf("%d records", len(records))
	}
	rec := records[0]
	if rec.Status != store.StatusBuilt || rec.DrvPath != req.DrvPath || rec.Name != "hello" || rec.CPUUser != 3*time.Second ||
		rec.LogSize != 14 || len(rec.Outputs) != 2 || rec.Key == "" || rec.Generation != "fake 1" || rec.Started.IsZero() || rec.Stopped.IsZero() {
		t.Errorf("record %+v", rec)
	}
	key, err := reuse.ParseKey(rec.Key)
	if err != nil {
		t.Fatal(err)
	}
	ends, err := bt.st.Ends(t.Context(), key, 0)
	if err != nil {
		t.Fatal(err)
	}
	if res := ends.Success; res == nil || res.Build != rec.ID || res.Outputs["out"].NarHash != info.NarHash {
		t.Errorf("result %+v", res)
	}

	r, sink = bt.build(req)
	wantStatus(t, r, nixproto.AlreadyValid)
	if len(r.Outputs) != 2 || sink.log(req.DrvPath) != "" || bt.runner.count("hello") != 1 {
		t.Errorf("second request: %+v", r)
	}
}

// A key that was asked for by a hook (all inputs named) and through a .drv file
// is the same.
func TestBuildKeyOfHookAndGraph(t *testing.T) {
	bt := newBuildTest(t, nil)
	lib := bt.add("lib", "a library")
	dep := drv("dep")
	dep.Env["content"] = string(lib)
	dep.InputSrcs = []nixproto.StorePath{lib}
	depPath := bt.addDrv(dep)
	top := drv("top")
	bt.dependsOn(top, depPath, "out")
	topPath := bt.addDrv(top)
	rs, _ := bt.paths(nixproto.BuildNormal, nixproto.DerivedPath{Path: topPath, AllOutputs: true})
	wantStatus(t, &rs[0].BuildResult, nixproto.Built)

	if _, err := bt.st.Delete(t.Context(), bt.account.ID, top.Outputs["out"].Path); err == nil {
		t.Fatal("output is not held by the session")
	}
	bt.session.leases.Release()
	if _, err := bt.st.Delete(t.Context(), bt.account.ID, top.Outputs["out"].Path); err != nil {
		t.Fatal(err)
	}
	bt.session = bt.newSession(bt.account)
	basic := *top
	basic.InputDrvs = nil
	basic.InputSrcs = []nixproto.StorePath{dep.Outputs["out"].Path, lib}
	slices.Sort(basic.InputSrcs)
	r, _ := bt.build(&BuildRequest{DrvPath: topPath, Drv: &basic})
	wantStatus(t, r, nixproto.Built)
	if r.Outputs["out"].DrvHash == rs[0].Outputs["out"].DrvHash {
		t.Error("hash of the derivation as received is that of the file")
	}
	var keys []string
	for _, rec := range bt.requests() {
		if rec.Name == "top" {
			keys = append(keys, rec.Key)
		}
	}
	if len(keys) != 2 || keys[0] != keys[1] {
		t.Errorf("keys %q", keys)
	}
}

func TestBuildFailures(t *testing.T) {
	limits := Limits{Timeout: 7 * time.Second, MaxSilent: 5 * time.Second, MaxLogSize: 1000}
	bt := newBuildTest(t, func(c *BuildsConfig) { c.Limits = limits })
	for i, c := range []struct {
		name   string
		err    error
		status nixproto.BuildStatus
		record string
		parts  []string
	}{
		{"exit", exit(3), nixproto.PermanentFailure, store.StatusBuildFailed,
			[]string{"builder for '/nix/store/", "failed with exit code 3;\nlast 3 log lines:\n> one\n> last word\n> ?[31mred"}},
		{"signal", &vm.BuildError{Kind: vm.Failed, Signal: 4}, nixproto.PermanentFailure, store.StatusBuildFailed,
			[]string{"failed due to signal 4 (Illegal instruction)"}},
		{"no builder", &vm.BuildError{Kind: vm.Failed, Message: "executing '/no/such/program': No such file or directory"}, nixproto.PermanentFailure, store.StatusBuildFailed,
			[]string{"executing '/no/such/program'"}},
		{"timeout", &vm.BuildError{Kind: vm.TimedOut}, nixproto.TimedOut, store.StatusTimeout, []string{"timed out after 7 seconds"}},
		{"silent", &vm.BuildError{Kind: vm.Silent}, nixproto.TimedOut, store.StatusTimeout, []string{"timed out after 5 seconds of silence"}},
		{"log", &vm.BuildError{Kind: vm.LogLimit}, nixproto.LogLimitExceeded, store.StatusLogLimit, []string{"more than 1000 bytes of log"}},
		{"processes", &vm.BuildError{Kind: vm.ProcessLimit, Message: "too many processes"}, nixproto.MiscFailure, store.StatusMaxMemoryExceeded, []string{"too many processes"}},
		{"space", &vm.BuildError{Kind: vm.NoSpace, Message: "no space"}, nixproto.MiscFailure, store.StatusMaxMemoryExceeded, []string{"no space"}},
		{"missing", &vm.BuildError{Kind: vm.OutputMissing, Message: "failed to produce output 'out'"}, nixproto.OutputRejected, store.StatusBuildFailed, []string{"failed to produce output 'out'"}},
		{"fifo", &vm.BuildError{Kind: vm.OutputRefused, Message: "'p' is a FIFO"}, nixproto.OutputRejected, store.StatusBuildFailed, []string{"FIFO"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			bt.t = t
			name := fmt.Sprint("x-", i)
			bt.runner.act(name, func(f *fakeRun) error {
				if f.spec.Timeout != limits.Timeout || f.spec.MaxSilent != limits.MaxSilent || f.spec.MaxLog != limits.MaxLogSize {
					t.Errorf("limits of the guest: %+v", f.spec)
				}
				f.say("one\n@nix {}\nlost\rlast word\n\x1b[31mred")
				return c.err
			})
			req := bt.request(drv(name))
			r, _ := bt.build(req)
			wantError(t, r, c.status, c.parts...)
			if rec := bt.records()[i]; rec.Status != c.record || rec.Error == "" || strings.Contains(rec.Error, "\n") {
				t.Errorf("record %q, %q", rec.Status, rec.Error)
			}
			if n := bt.runner.count(name); n != 1 {
				t.Errorf("%d runs", n)
			}
			if valid, err := bt.st.Valid(t.Context(), bt.account.ID, staticOutputs(req.Drv)); err != nil || len(valid) != 0 {
				t.Errorf("outputs of a failed build: %v, %v", valid, err)
			}
		})
	}
}

func TestBuildRefusals(t *testing.T) {
	impure := drv("x")
	impure.Outputs["out"] = nixproto.DerivationOutput{HashAlgo: "r:sha256", Hash: "impure"}
	wrongFixed := fixedDrv(t, "x", "sha256", nixproto.SumSHA256(nil))
	out := wrongFixed.Outputs["out"]
	out.Path = nixproto.StorePath(strings.Replace(string(out.Path), "/nix/store/", "/nix/store/0", 1)[:43] + "-x")
	wrongFixed.Outputs["out"] = out
	git := drv("x")
	git.Outputs["out"] = nixproto.DerivationOutput{HashAlgo: "git:sha1"}
	bt := newBuildTest(t, nil)
	for _, c := range []struct {
		name  string
		drv   *nixproto.Derivation
		set   map[string]string
		parts []string
	}{
		{"system", &nixproto.Derivation{System: "riscv64-linux"}, nil, []string{"'riscv64-linux'", "i686-linux, x86_64-linux"}},
		{"builtin system", &nixproto.Derivation{System: "builtin"}, nil, []string{"builtin"}},
		{"feature", nil, map[string]string{"requiredSystemFeatures": "big-parallel no-such"}, []string{"'no-such'", "benchmark, big-parallel, ca-derivations"}},
		{"structured feature", nil, map[string]string{"__json": `{"requiredSystemFeatures":["no-such"]}`}, []string{"'no-such'"}},
		{"bad features", nil, map[string]string{"__json": `{"requiredSystemFeatures":1}`}, []string{"requiredSystemFeatures"}},
		{"bad json", nil, map[string]string{"__json": `[`}, []string{"JSON"}},
		{"no sandbox", nil, map[string]string{"__noChroot": "1"}, []string{"__noChroot"}},
		{"no sandbox, structured", nil, map[string]string{"__json": `{"__noChroot":true}`}, []string{"__noChroot"}},
		{"host files", nil, map[string]string{"__impureHostDeps": "/etc"}, []string{"__impureHostDeps"}},
		{"impure", impure, nil, []string{"impure"}},
		{"fixed path", wrongFixed, nil, []string{"its path should be"}},
		{"git", git, nil, []string{"Git"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			bt.t = t
			d := c.drv
			if d == nil || d.Outputs == nil {
				d = drv("x")
			}
			if c.drv != nil && c.drv.System != "" {
				d.System = c.drv.System
			}
			for k, v := range c.set {
				d.Env[k] = v
			}
			r, _ := bt.build(bt.request(d))
			wantError(t, r, nixproto.InputRejected, c.parts...)
			if strings.Contains(r.Error, "\n") {
				t.Errorf("more than one sentence: %q", r.Error)
			}
			if len(bt.records()) != 0 {
				t.Error("a refused request left a record")
			}
		})
	}
}

func TestBuildNamesMissingInputs(t *testing.T) {
	bt := newBuildTest(t, nil)
	bob, err := bt.st.AddAccount(t.Context(), "bob")
	if err != nil {
		t.Fatal(err)
	}
	there, bobs := bt.add("there", "x"), bt.addFor(bob.ID, "bobs", "y")
	d := drv("x")
	d.InputSrcs = []nixproto.StorePath{there, bobs}
	slices.Sort(d.InputSrcs)
	r, _ := bt.build(bt.request(d))
	wantError(t, r, nixproto.MiscFailure, string(bobs))
	if strings.Contains(r.Error, string(there)) {
		t.Errorf("names an input that is there: %q", r.Error)
	}
}

// joinTest starts a build and waits until its log reached the first client.
func joinTest(t *testing.T, bt *buildTest, req *BuildRequest) (ctx context.Context, cancel func(), done chan *nixproto.BuildResult, sink *fakeSink) {
	t.Helper()
	ctx, cancelCause := context.WithCancelCause(t.Context())
	sink = newFakeSink()
	done = make(chan *nixproto.BuildResult, 1)
	go func() {
		r, err := bt.Build(ctx, bt.session, req, sink)
		if err != nil && !errors.Is(err, errGone) {
			t.Errorf("build: %v", err)
		}
		done <- r
	}()
	<-sink.grown
	return ctx, func() { cancelCause(errGone) }, done, sink
}

func TestBuildJoins(t *testing.T) {
	bt := newBuildTest(t, nil)
	release := make(chan struct{})
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("from the beginning")
		select {
		case <-release:
		case <-f.ctx.Done():
			return f.ctx.Err()
		}
		f.say("to the end")
		return f.writeContent()
	})
	req := bt.request(drv("x"))
	_, cancel, first, _ := joinTest(t, bt, req)
	_, _, second, sink := joinTest(t, bt, req)
	cancel() // the first one leaves
	if r := <-first; r != nil {
		t.Errorf("result of a client that left: %+v", r)
	}
	close(release)
	wantStatus(t, <-second, nixproto.Built)
	if got := sink.log(req.DrvPath); got != "from the beginning\nto the end\n" {
		t.Errorf("log of the second: %q", got)
	}
	if len(sink.notes) != 1 || !strings.Contains(sink.notes[0], "is being built already") {
		t.Errorf("notes %q", sink.notes)
	}
	if n := bt.runner.count("x"); n != 1 {
		t.Errorf("%d runs", n)
	}
}

func TestBuildIsCancelledByTheLastToLeave(t *testing.T) {
	bt := newBuildTest(t, nil)
	killed := make(chan struct{})
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("begun")
		<-f.ctx.Done()
		close(killed)
		return f.ctx.Err()
	})
	req := bt.request(drv("x"))
	_, cancel1, first, _ := joinTest(t, bt, req)
	_, cancel2, second, _ := joinTest(t, bt, req)
	cancel1()
	<-first
	select {
	case <-killed:
		t.Error("killed while somebody waited")
	default:
	}
	cancel2()
	<-second
	<-killed
	if err := bt.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if rec := bt.records()[0]; rec.Status != store.StatusClientDisconnect {
		t.Errorf("record %q", rec.Status)
	}
}

func TestBuildWhileServerEnds(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("begun")
		<-f.ctx.Done()
		return f.ctx.Err()
	})
	req := bt.request(drv("x"))
	_, _, done, _ := joinTest(t, bt, req)
	bt.Close()
	wantError(t, <-done, nixproto.TransientFailure, "shutting down")
	if rec := bt.records()[0]; rec.Status != store.StatusInternalError {
		t.Errorf("record %q", rec.Status)
	}
	if _, err := bt.Build(t.Context(), bt.session, req, newFakeSink()); !errors.Is(err, errEnding) {
		t.Errorf("build after Close: %v", err)
	}
}

func TestBuildRetriesTransientEnds(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("try %d", f.try)
		if f.try <= 3 {
			return errors.New("qemu died in /var/lib/secret")
		}
		return f.writeContent()
	})
	req := bt.request(drv("x"))
	r, sink := bt.build(req)
	wantStatus(t, r, nixproto.Built)
	if got := sink.log(req.DrvPath); got != "try 1\ntry 2\ntry 3\ntry 4\n" {
		t.Errorf("log %q", got)
	}
	if len(sink.notes) != 3 || !strings.Contains(sink.notes[2], "trying again (3 of 3)") || strings.Contains(fmt.Sprint(sink.notes), "secret") {
		t.Errorf("notes %q", sink.notes)
	}
	recs := bt.records()
	for i, rec := range recs {
		want := store.StatusInternalError
		if i == 3 {
			want = store.StatusBuilt
		}
		if rec.Status != want {
			t.Errorf("record %d: %q", i, rec.Status)
		}
		if i > 0 && (rec.RestartOf != recs[i-1].ID || recs[i-1].RestartedAs != rec.ID) {
			t.Errorf("records %d and %d are not linked", i-1, i)
		}
	}
}

func TestBuildGivesUpAfterRetries(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("x", func(f *fakeRun) error { return errors.New("qemu died") })
	req := bt.request(drv("x"))
	r, _ := bt.build(req)
	wantError(t, r, nixproto.TransientFailure, "internal error")
	if n := bt.runner.count("x"); n != 4 {
		t.Errorf("%d runs", n)
	}
	bt.runner.act("x", nil)
	r, _ = bt.build(req)
	wantStatus(t, r, nixproto.Built)
}

func TestBuildOnAFullDiskIsNotRetried(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("x", func(f *fakeRun) error { return fmt.Errorf("store output: %w", store.ErrNoSpace) })
	r, _ := bt.build(bt.request(drv("x")))
	wantError(t, r, nixproto.TransientFailure, "no space left")
	if n := bt.runner.count("x"); n != 1 {
		t.Errorf("%d runs", n)
	}
}

func TestBuildThatCannotBeTried(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("x", func(f *fakeRun) error { return &vm.SpecError{Message: "passAsFile is odd"} })
	r, _ := bt.build(bt.request(drv("x")))
	wantError(t, r, nixproto.InputRejected, "passAsFile is odd")
	if recs := bt.records(); len(recs) != 1 || recs[0].Status != store.StatusClientError {
		t.Errorf("records %+v", recs)
	}
}

func TestBuildSurvivesPanics(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("x", func(f *fakeRun) error { panic("a defect") })
	r, _ := bt.build(bt.request(drv("x")))
	wantError(t, r, nixproto.TransientFailure, "internal error")
	if s := bt.QueueStatus(); s.Running != 0 || s.Free != s.Total {
		t.Errorf("its place is not free again: %+v", s)
	}
}

func TestBuildTellsOfEmulation(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.status = vm.Status{Accel: "tcg", WhyNotKVM: "/dev/kvm is not there"}
	req := bt.request(drv("x"))
	r, sink := bt.build(req)
	wantStatus(t, r, nixproto.Built)
	if len(sink.notes) != 1 || !strings.Contains(sink.notes[0], "emulated machine (TCG)") || strings.Contains(sink.notes[0], "/dev/kvm") {
		t.Errorf("notes %q", sink.notes)
	}
	if got := sink.log(req.DrvPath); got != "" {
		t.Errorf("log %q", got)
	}
}

func TestBuildRunsOutOfMemory(t *testing.T) {
	bt := newBuildTest(t, func(c *BuildsConfig) { c.MemoryMiB, c.MaxMemoryMiB = 1000, 3000 })
	var sizes []int
	bt.runner.act("x", func(f *fakeRun) error {
		sizes = append(sizes, f.spec.MemoryMiB)
		return &vm.BuildError{Kind: vm.OutOfMemory, Message: "out of memory"}
	})
	r, _ := bt.build(bt.request(drv("x")))
	wantError(t, r, nixproto.MiscFailure, "out of memory")
	if !slices.Equal(sizes, []int{1000, 2000, 3000}) {
		t.Errorf("memory of the tries: %v", sizes)
	}
	var statuses []string
	for _, rec := range bt.records() {
		statuses = append(statuses, rec.Status)
	}
	if want := []string{store.StatusOutOfMemory, store.StatusOutOfMemory, store.StatusMaxMemoryExceeded}; !slices.Equal(statuses, want) {
		t.Errorf("records %q", statuses)
	}
}

// Each of those who wait for a run is ended by its own limits alone.
func TestBuildLimitsOfThoseWhoJoin(t *testing.T) {
	bt := newBuildTest(t, nil)
	release := make(chan struct{})
	bt.runner.act("x", func(f *fakeRun) error {
		f.say("begun")
		<-release
		return f.writeContent()
	})
	loose := bt.request(drv("x"))
	silent, short, chatty := *loose, *loose, *loose
	silent.Limits.MaxSilent = time.Second
	short.Limits.Timeout = time.Second
	chatty.Limits.MaxLogSize = 3
	_, _, first, _ := joinTest(t, bt, &short)
	_, _, second, sink := joinTest(t, bt, loose)
	r, _ := bt.build(&silent)
	wantError(t, r, nixproto.TimedOut, "1 seconds of silence")
	r, _ = bt.build(&chatty)
	wantError(t, r, nixproto.LogLimitExceeded, "more than 3 bytes")
	wantError(t, <-first, nixproto.TimedOut, "timed out after 1 seconds")
	close(release)
	wantStatus(t, <-second, nixproto.Built)
	if got := sink.log(loose.DrvPath); got != "begun\n" || bt.runner.count("x") != 1 {
		t.Errorf("log of the loose one: %q", got)
	}
	// The run is that of the one who stayed.
	var statuses []string
	for _, rec := range bt.records() {
		statuses = append(statuses, rec.Status)
	}
	if want := []string{store.StatusTimeout, store.StatusBuilt}; !slices.Equal(statuses, want) {
		t.Errorf("records of runs %q, want %q", statuses, want)
	}
}

func TestBuildPolicyStaysWithinTheOperators(t *testing.T) {
	bt := newBuildTest(t, func(c *BuildsConfig) {
		c.Limits = Limits{Timeout: time.Hour, MaxLogSize: 1 << 20}
		c.CPUs, c.MemoryMiB, c.MaxMemoryMiB, c.Retries = 4, 1000, 4000, 2
	})
	for _, c := range []struct {
		name string
		env  map[string]string
		sent Limits
		want Limits
		cpus int
		mem  int
	}{
		{"none", nil, Limits{}, Limits{Timeout: time.Hour, MaxLogSize: 1 << 20}, 4, 1000},
		{"environment", map[string]string{"NBD_TIMEOUT": "5", "NIXBUILDNET_MAX_SILENT_TIME": "6", "NBD_MAX_LOG_SIZE": "7"}, Limits{},
			Limits{5 * time.Second, 6 * time.Second, 7}, 4, 1000},
		{"sent", map[string]string{"NBD_TIMEOUT": "5"}, Limits{Timeout: 9 * time.Second}, Limits{9 * time.Second, 0, 1 << 20}, 4, 1000},
		{"ceiling", map[string]string{"NBD_TIMEOUT": "7200", "NBD_MIN_MEM": "9000", "NBD_DEFAULT_CPU": "2000"}, Limits{MaxLogSize: 1 << 40},
			Limits{time.Hour, 0, 1 << 20}, 1000, 4000},
		{"less", map[string]string{"NBD_MAX_MEM": "500", "NBD_MAX_CPU": "1"}, Limits{}, Limits{time.Hour, 0, 1 << 20}, 1, 500},
	} {
		t.Run(c.name, func(t *testing.T) {
			bt.t = t
			p, err := bt.policy(bt.newSessionWith(bt.account, c.env), nil, c.sent)
			if err != nil {
				t.Fatal(err)
			}
			if p.limits != c.want || p.cpus != c.cpus || p.memoryMiB != c.mem || p.restarts != 2 {
				t.Errorf("policy %+v, want limits %+v", p, c.want)
			}
		})
	}
}

func TestBuildCheck(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("random", func(f *fakeRun) error { return f.write("out", fmt.Sprint(f.try), false) })
	for _, c := range []struct {
		name   string
		status nixproto.BuildStatus
	}{{"same", nixproto.Built}, {"random", nixproto.NotDeterministic}} {
		req := bt.request(drv(c.name))
		req.Mode = nixproto.BuildCheck
		r, _ := bt.build(req)
		wantError(t, r, nixproto.MiscFailure, "cannot be checked")
		req.Mode = nixproto.BuildNormal
		r, _ = bt.build(req)
		wantStatus(t, r, nixproto.Built)
		before := bt.info(req.Drv.Outputs["out"].Path).NarHash
		req.Mode = nixproto.BuildCheck
		r, _ = bt.build(req)
		wantStatus(t, r, c.status)
		if n := bt.runner.count(c.name); n != 2 {
			t.Errorf("%s: %d runs", c.name, n)
		}
		if bt.info(req.Drv.Outputs["out"].Path).NarHash != before {
			t.Errorf("%s: contents changed", c.name)
		}
	}
	for _, rec := range bt.records() {
		if rec.Key != "" && rec.Status == store.StatusBuildFailed {
			t.Error("a failed check has a key")
		}
	}
}

func TestBuildRepair(t *testing.T) {
	bt := newBuildTest(t, nil)
	req := bt.request(drv("x"))
	r, _ := bt.build(req)
	wantStatus(t, r, nixproto.Built)
	req.Mode = nixproto.BuildRepair
	r, _ = bt.build(req)
	wantStatus(t, r, nixproto.AlreadyValid)
	if n := bt.runner.count("x"); n != 1 {
		t.Errorf("%d runs", n)
	}
	missing := bt.request(drv("y"))
	missing.Mode = nixproto.BuildRepair
	r, _ = bt.build(missing)
	wantStatus(t, r, nixproto.Built)
}

// A key without store:write cannot make an output path valid by its word.
func TestBuildWithoutStoreWrite(t *testing.T) {
	bt := newBuildTest(t, nil)
	c := *bt.session.Client
	c.Permissions = []string{string(BuildWrite), string(StoreRead)}
	bt.session.Client = &c

	r, _ := bt.build(bt.request(drv("unknown")))
	wantError(t, r, nixproto.InputRejected, "store:write")

	known := drv("known")
	path := bt.addDrv(known)
	r, _ = bt.build(&BuildRequest{DrvPath: path, Drv: known})
	wantStatus(t, r, nixproto.Built)

	squat := drv("known")
	squat.Outputs["out"] = drv2(bt, "other").Outputs["out"]
	squat.Name = "other"
	r, _ = bt.build(&BuildRequest{DrvPath: path, Drv: squat})
	wantStatus(t, r, nixproto.InputRejected)

	r, _ = bt.build(bt.request(fixedDrv(t, "f", "sha256", nixproto.SumSHA256([]byte("f")))))
	wantStatus(t, r, nixproto.Built) // its path is proven by its contents
}

// drv2 is drv with its paths.
func drv2(bt *buildTest, name string) *nixproto.Derivation {
	d := drv(name)
	bt.settlePaths(d)
	return d
}

func TestBuildStatusesOfStoreAndReuseAgree(t *testing.T) {
	for a, b := range map[reuse.Status]string{
		reuse.Pending: store.StatusPending, reuse.Running: store.StatusRunning, reuse.Built: store.StatusBuilt,
		reuse.BuildFailed: store.StatusBuildFailed, reuse.Timeout: store.StatusTimeout, reuse.InternalError: store.StatusInternalError,
		reuse.LogLimit: store.StatusLogLimit, reuse.OutOfMemory: store.StatusOutOfMemory, reuse.MaxMemoryExceeded: store.StatusMaxMemoryExceeded,
		reuse.ClientDisconnect: store.StatusClientDisconnect, reuse.Cancelled: store.StatusCancelled, reuse.ClientError: store.StatusClientError,
	} {
		if string(a) != b {
			t.Errorf("%q and %q", a, b)
		}
	}
}
