package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/nixproto/nar"
	"nbd/store"
	"nbd/vm"
)

// A fakeRunner runs builds without guests: what a derivation does is a function
// by its name, or to write its variable "content" to each output.
type fakeRunner struct {
	mu         sync.Mutex
	status     vm.Status
	generation string // default "fake 1"
	unknown    bool   // what there is, until Qualify or Generation
	nested     bool   // guests can run guests
	noAArch64  bool   // that system is switched off
	acts       map[string]func(*fakeRun) error
	runs       map[string]int // by derivation name
	running    int
	most       int // most at once
}

// A fakeRun is one run, as an act sees it.
type fakeRun struct {
	ctx  context.Context
	spec *vm.Spec
	log  io.Writer
	outs vm.Outputs
	try  int // from 1
	// result is what Run returns, beside an error too.
	result *vm.Result
}

// Systems implements runner: one that is set up, with its 32-bit twin, and one
// that is not.
func (r *fakeRunner) Systems() []vm.System {
	return []vm.System{{Name: "x86_64-linux", Offered: true}, {Name: "i686-linux", Offered: true},
		{Name: "aarch64-linux", SwitchedOff: r.noAArch64, WhyNot: "no QEMU at /a/host/path"}}
}

// Offers implements runner.
func (r *fakeRunner) Offers(system string) bool {
	return slices.ContainsFunc(r.Systems(), func(s vm.System) bool { return s.Name == system && s.Offered })
}

// Features implements runner: what the builder can do is known after Qualify.
func (r *fakeRunner) Features() []vm.Feature {
	r.mu.Lock()
	defer r.mu.Unlock()
	kvm := vm.Feature{Name: "kvm", Offered: r.nested && !r.unknown, Unknown: r.unknown}
	if !kvm.Offered {
		kvm.WhyNot = "/dev/kvm of the host"
	}
	return []vm.Feature{kvm}
}

// Emulated implements runner.
func (r *fakeRunner) Emulated(string) bool { return r.status.Accel == "tcg" }

// Generation implements runner.
func (r *fakeRunner) Generation(context.Context, string) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unknown = false
	return cmp.Or(r.generation, "fake 1"), nil
}

func (r *fakeRunner) Qualify(context.Context, bool) (vm.Status, error) {
	r.mu.Lock()
	r.unknown = false
	r.mu.Unlock()
	return r.status, nil
}

func (r *fakeRunner) act(name string, f func(*fakeRun) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.acts[name] = f
}

func (r *fakeRunner) count(name string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.runs[name]
}

// Run implements runner.
func (r *fakeRunner) Run(ctx context.Context, spec *vm.Spec, log io.Writer, outs vm.Outputs) (*vm.Result, error) {
	r.mu.Lock()
	r.runs[spec.Drv.Name]++
	result := &vm.Result{Start: time.Unix(1000, 0), Stop: time.Unix(1010, 0), CPUUser: 3 * time.Second, CPUSystem: time.Second, PeakMemory: 1 << 20}
	run := &fakeRun{ctx, spec, log, outs, r.runs[spec.Drv.Name], result}
	act := r.acts[spec.Drv.Name]
	r.running++
	r.most = max(r.most, r.running)
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		r.running--
		r.mu.Unlock()
	}()
	if act == nil {
		act = (*fakeRun).writeContent
	}
	if err := act(run); err != nil {
		var failed *vm.BuildError
		if errors.As(err, &failed) && !failed.Result.Start.IsZero() {
			result = &failed.Result
		}
		return result, err
	}
	for _, o := range spec.Outputs {
		result.Produced = append(result.Produced, o.Name)
	}
	return result, nil
}

// say prints a line of log.
func (f *fakeRun) say(format string, args ...any) { fmt.Fprintf(f.log, format+"\n", args...) }

// path is where the builder finds an output.
func (f *fakeRun) path(name string) string {
	for _, o := range f.spec.Outputs {
		if o.Name == name {
			return string(o.Path)
		}
	}
	panic("no output " + name)
}

// write makes an output that is a file.
func (f *fakeRun) write(name, content string, executable bool) error {
	return f.output(name, func(w *nar.Writer) error {
		if err := w.File("", executable, int64(len(content))); err != nil {
			return err
		}
		_, err := io.WriteString(w, content)
		return err
	})
}

// output makes an output.
func (f *fakeRun) output(name string, make func(*nar.Writer) error) error {
	out, err := f.outs.Create(f.ctx, name)
	if err != nil {
		return err
	}
	w := nar.NewWriter(out)
	err = make(w)
	if err == nil {
		err = w.Close()
	}
	if err == nil {
		return out.Close()
	}
	out.Abort()
	return err
}

// writeContent writes the derivation's variable "content" to each output; in
// it, $NAME stands for the path of an output.
func (f *fakeRun) writeContent() error {
	for _, o := range f.spec.Outputs {
		content := f.spec.Drv.Env["content"]
		for _, other := range f.spec.Outputs {
			content = strings.ReplaceAll(content, "$"+other.Name, string(other.Path))
		}
		if err := f.write(o.Name, content, false); err != nil {
			return err
		}
	}
	return nil
}

// exit is what a run that failed returns.
func exit(status int) error {
	return &vm.BuildError{Kind: vm.Failed, ExitStatus: status, Message: "builder failed",
		Result: vm.Result{Start: time.Unix(1000, 0), Stop: time.Unix(1001, 0)}}
}

// A buildTest is a Builds over a real store and a fake runner, and the account
// alice.
type buildTest struct {
	*Builds
	t       *testing.T
	dir     string // of st
	st      *store.Store
	runner  *fakeRunner
	account store.Account
	session *Session
	book    *settingsBook

	modulo   *nixproto.Modulo
	drvFiles map[nixproto.StorePath]*nixproto.Derivation // that addDrv made
	unstored []store.Registration                        // of them; see flush
}

func newBuildTest(t *testing.T, change func(*BuildsConfig)) *buildTest {
	t.Helper()
	return newBuildTestOn(t, t.TempDir(), change)
}

// newBuildTestOn is newBuildTest with a state directory that may hold what
// another one left.
func newBuildTestOn(t *testing.T, dir string, change func(*BuildsConfig)) *buildTest {
	t.Helper()
	st, err := store.Open(dir, store.Config{ServerName: "test", MinFree: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	bt := &buildTest{t: t, dir: dir, st: st, drvFiles: map[nixproto.StorePath]*nixproto.Derivation{}, runner: &fakeRunner{acts: map[string]func(*fakeRun) error{}, runs: map[string]int{}}}
	bt.modulo = nixproto.NewModulo(func(p nixproto.StorePath) (*nixproto.Derivation, error) { return bt.drvFiles[p], nil })
	cfg := BuildsConfig{Store: st, Runner: bt.runner, Room: Room{Guests: 4, MemoryMiB: 1 << 20, CPUs: 1000},
		ScratchMiB: 1024, MaxScratchMiB: 1024, MachineCPUs: 8}
	if testing.Verbose() {
		cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	if change != nil {
		change(&cfg)
	}
	if bt.Builds, err = NewBuilds(context.Background(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(bt.Close)
	bt.account, err = st.AccountByName(t.Context(), "alice")
	if errors.Is(err, store.ErrNotFound) {
		bt.account, err = st.AddAccount(t.Context(), "alice")
	}
	if err != nil {
		t.Fatal(err)
	}
	bt.book = newSettingsBook(nil, st, slog.New(slog.DiscardHandler))
	bt.session = bt.newSession(bt.account)
	return bt
}

// newSession returns a session of a key with all permissions.
func (bt *buildTest) newSession(a store.Account) *Session { return bt.newSessionWith(a, nil) }

// newSessionWith is newSession with an environment.
func (bt *buildTest) newSessionWith(a store.Account, env map[string]string) *Session {
	bt.t.Helper()
	sight := bt.st.NewSight(a.ID, store.Trust{})
	lease := sight.NewLease()
	bt.t.Cleanup(lease.Release)
	s := &Session{
		ID: "test", Env: env, book: bt.book, Client: &Client{Account: a, Permissions: store.Permissions()},
		Sight: sight, Log: slog.New(slog.DiscardHandler), leases: lease,
	}
	if err := s.setSettings(); err != nil {
		bt.t.Fatal(err)
	}
	return s
}

// add puts a text with references into alice's view.
func (bt *buildTest) add(name, text string, refs ...nixproto.StorePath) nixproto.StorePath {
	bt.t.Helper()
	return bt.addFor(bt.account.ID, name, text, refs...)
}

func (bt *buildTest) addFor(a store.AccountID, name, text string, refs ...nixproto.StorePath) nixproto.StorePath {
	bt.t.Helper()
	bt.flush()
	reg := bt.text(name, text, refs)
	if err := bt.st.Register(bt.t.Context(), a, []store.Registration{reg}); err != nil {
		bt.t.Fatal(err)
	}
	return reg.Info.Path
}

// text stages a text with references.
func (bt *buildTest) text(name, text string, refs []nixproto.StorePath) store.Registration {
	bt.t.Helper()
	refs = slices.Compact(slices.Sorted(slices.Values(refs)))
	hash := nixproto.SumSHA256([]byte(text))
	path, err := nixproto.MakeTextPath(name, hash, refs)
	if err != nil {
		bt.t.Fatal(err)
	}
	staged, err := bt.st.Stage(bt.t.Context(), bt.session.account())
	if err != nil {
		bt.t.Fatal(err)
	}
	w := nar.NewWriter(staged)
	err = w.File("", false, int64(len(text)))
	if err == nil {
		_, err = io.WriteString(w, text)
	}
	if err = errors.Join(err, w.Close(), staged.Finish()); err != nil {
		bt.t.Fatal(err)
	}
	ca := nixproto.ContentAddress{Method: nixproto.CAText, Hash: hash}
	return store.Registration{Info: nixproto.PathInfo{Path: path, References: refs, CA: ca.String()}, Staged: staged}
}

// flush stores the derivations that were added, all at once.
func (bt *buildTest) flush() {
	bt.t.Helper()
	if len(bt.unstored) == 0 {
		return
	}
	if err := bt.st.Register(bt.t.Context(), bt.account.ID, bt.unstored); err != nil {
		bt.t.Fatal(err)
	}
	bt.unstored = nil
}

// drv returns an input-addressed derivation with the outputs named, "out" if
// none is; their paths are set by addDrv.
func drv(name string, outputs ...string) *nixproto.Derivation {
	d := &nixproto.Derivation{
		Name: name, System: "x86_64-linux", Builder: "/bin/sh", Env: map[string]string{"name": name, "content": name},
		Outputs: map[string]nixproto.DerivationOutput{},
	}
	if len(outputs) == 0 {
		outputs = []string{"out"}
	}
	for _, o := range outputs {
		d.Outputs[o] = nixproto.DerivationOutput{}
		d.Env[o] = ""
	}
	return d
}

// floatingDrv returns a content-addressed derivation.
func floatingDrv(name string, outputs ...string) *nixproto.Derivation {
	d := drv(name, outputs...)
	for o := range d.Outputs {
		d.Outputs[o] = nixproto.DerivationOutput{HashAlgo: "r:sha256"}
		d.Env[o] = nixproto.Placeholder(o)
	}
	return d
}

// fixedDrv returns a derivation with a fixed output.
func fixedDrv(t testing.TB, name, hashAlgo string, hash nixproto.Hash) *nixproto.Derivation {
	t.Helper()
	d := drv(name)
	d.Outputs["out"] = nixproto.DerivationOutput{Path: "x", HashAlgo: hashAlgo, Hash: hash.Base16()}
	ca, err := d.Outputs["out"].ContentAddress()
	if err != nil {
		t.Fatal(err)
	}
	path, err := ca.Path(name, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	d.Outputs["out"] = nixproto.DerivationOutput{Path: path, HashAlgo: hashAlgo, Hash: hash.Base16()}
	d.Env["out"] = string(path)
	return d
}

// dependsOn makes outputs of other derivations inputs of d, and puts their
// paths, or what stands for them, into its content.
func (bt *buildTest) dependsOn(d *nixproto.Derivation, on nixproto.StorePath, outputs ...string) {
	bt.t.Helper()
	if d.InputDrvs == nil {
		d.InputDrvs = map[nixproto.StorePath][]string{}
	}
	d.InputDrvs[on] = outputs
	input := bt.drvFiles[on]
	for _, o := range outputs {
		p := string(input.Outputs[o].Path)
		if p == "" {
			p = nixproto.UpstreamPlaceholder(on, o)
		}
		d.Env["content"] += " " + p
	}
}

// settlePaths gives an input-addressed derivation its output paths; they stay
// unknown if they are deferred.
func (bt *buildTest) settlePaths(d *nixproto.Derivation) {
	bt.t.Helper()
	m := bt.modulo
	if kind, err := d.Kind(); err != nil || kind != nixproto.Deferred {
		return
	}
	paths, ok, err := m.OutputPaths(d)
	if err != nil {
		bt.t.Fatal(err)
	}
	for name, p := range paths {
		d.Outputs[name] = nixproto.DerivationOutput{Path: p}
		d.Env[name] = string(p)
	}
	if !ok {
		for name := range d.Outputs {
			d.Env[name] = nixproto.Placeholder(name)
		}
	}
}

// addDrv completes d and puts its file into alice's view, at the next flush.
func (bt *buildTest) addDrv(d *nixproto.Derivation) nixproto.StorePath {
	bt.t.Helper()
	bt.settlePaths(d)
	reg := bt.text(d.Name+".drv", string(d.ATerm()), d.References())
	bt.unstored = append(bt.unstored, reg)
	bt.drvFiles[reg.Info.Path] = d
	return reg.Info.Path
}

// request asks for a derivation without input derivations.
func (bt *buildTest) request(d *nixproto.Derivation) *BuildRequest {
	bt.t.Helper()
	bt.settlePaths(d)
	path, err := d.DrvPath()
	if err != nil {
		bt.t.Fatal(err)
	}
	return &BuildRequest{DrvPath: path, Drv: d}
}

// build builds and returns the result and what the client saw.
func (bt *buildTest) build(req *BuildRequest) (*nixproto.BuildResult, *fakeSink) {
	bt.t.Helper()
	bt.flush()
	sink := newFakeSink()
	ctx, cancel := context.WithTimeout(bt.t.Context(), patience)
	defer cancel()
	r, err := bt.Build(ctx, bt.session, req, sink)
	if err != nil {
		bt.t.Fatal(err)
	}
	return r, sink
}

// paths builds derived paths.
func (bt *buildTest) paths(mode nixproto.BuildMode, paths ...nixproto.DerivedPath) ([]nixproto.KeyedBuildResult, *fakeSink) {
	bt.t.Helper()
	bt.flush()
	sink := newFakeSink()
	ctx, cancel := context.WithTimeout(bt.t.Context(), patience)
	defer cancel()
	rs, err := bt.BuildPaths(ctx, bt.session, &PathsRequest{Paths: paths, Mode: mode}, sink)
	if err != nil {
		bt.t.Fatal(err)
	}
	return rs, sink
}

// info returns what is known of a path in alice's view.
func (bt *buildTest) info(p nixproto.StorePath) *nixproto.PathInfo {
	bt.t.Helper()
	info, err := bt.st.Info(bt.t.Context(), bt.account.ID, p)
	if err != nil {
		bt.t.Fatal(err)
	}
	return info
}

// content returns the contents of a path that is a file.
func (bt *buildTest) content(p nixproto.StorePath) string {
	bt.t.Helper()
	text, err := bt.readFile(bt.t.Context(), bt.info(p))
	if err != nil {
		bt.t.Fatal(err)
	}
	return string(text)
}

// records returns the records of alice's builds, oldest first.
func (bt *buildTest) records() []store.Build {
	bt.t.Helper()
	list, err := bt.st.Builds(bt.t.Context(), bt.account.ID, store.BuildFilter{})
	if err != nil {
		bt.t.Fatal(err)
	}
	slices.Reverse(list)
	return list
}

// requests is records, with those that were answered without a run.
func (bt *buildTest) requests() []store.Build { return bt.requestsOf(bt.account.ID) }

func (bt *buildTest) requestsOf(a store.AccountID) []store.Build {
	bt.t.Helper()
	list, err := bt.st.Builds(bt.t.Context(), a, store.BuildFilter{Reused: true})
	if err != nil {
		bt.t.Fatal(err)
	}
	slices.Reverse(list)
	return list
}

// wantStatus fails the test if r has another status.
func wantStatus(t *testing.T, r *nixproto.BuildResult, want nixproto.BuildStatus) {
	t.Helper()
	if r.Status != want {
		t.Fatalf("status %d, want %d; error: %s", r.Status, want, r.Error)
	}
	if r.Status.Success() != (r.Error == "") {
		t.Errorf("status %d with error %q", r.Status, r.Error)
	}
}

// wantError fails the test if r is not a failure with such a message.
func wantError(t *testing.T, r *nixproto.BuildResult, status nixproto.BuildStatus, parts ...string) {
	t.Helper()
	wantStatus(t, r, status)
	for _, part := range parts {
		if !strings.Contains(r.Error, part) {
			t.Errorf("error %q lacks %q", r.Error, part)
		}
	}
}

// A fakeSink records what a client is shown.
type fakeSink struct {
	mu     sync.Mutex
	logs   map[nixproto.StorePath]string
	notes  []string
	waits  []string
	copies []string // "PATH FROM"
	last   [4]uint64
	grown  chan struct{} // gets a token with each piece of log
}

func newFakeSink() *fakeSink {
	return &fakeSink{logs: map[nixproto.StorePath]string{}, grown: make(chan struct{}, 1000)}
}

type fakeLog struct {
	s   *fakeSink
	drv nixproto.StorePath
}

func (s *fakeSink) StartBuild(drv nixproto.StorePath) BuildLog { return &fakeLog{s, drv} }

func (s *fakeSink) StartWait(_ nixproto.StorePath, why string) func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waits = append(s.waits, why)
	return func() {}
}

func (s *fakeSink) StartCopy(path nixproto.StorePath, from string) func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.copies = append(s.copies, string(path)+" "+from)
	return func() {}
}

func (s *fakeSink) Progress(done, expected, running, failed uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = [4]uint64{done, expected, running, failed}
}

func (s *fakeSink) Note(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notes = append(s.notes, text)
}

func (s *fakeSink) log(drv nixproto.StorePath) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.logs[drv]
}

func (l *fakeLog) Write(p []byte) (int, error) {
	l.s.mu.Lock()
	l.s.logs[l.drv] += string(p)
	l.s.mu.Unlock()
	select {
	case l.s.grown <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (l *fakeLog) Stop() {}
