package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"nbd/server/config"
)

// The scripts of testdata/script drive the program as it ships, with real Nix,
// ssh and QEMU. Each promise to a user is one script, with a server, a state
// directory and a port of its own. Beside testscript's commands they have
//
//	serve [FLAG...]        start `nbd serve` and wait until it is ready
//	shutdown, kill9        end it by SIGTERM (and wait), by SIGKILL; testscript's own
//	                       `stop` would end the script, as one that passed
//	account NAME           make an account NAME with a key of its own
//	as NAME CMD...         run CMD as a client with that key: ssh reaches the
//	                       server as `nbd`, Nix's own store is $WORK/NAME
//	background NAME CMD... the same, without waiting; ended by `interrupt`
//	interrupt              SIGTERM to what `background` started, and wait
//	awaitlog TEXT          wait until the server has logged TEXT
//	awaitclient TEXT       wait until what `background` started has printed TEXT
//	rootless               let the server run as an ordinary user
//	small-state MIB        put the state on a file system of that size
//	guest-alive            fail unless a guest runs now
//	kill-guest             SIGKILL to the guests that run now; fail if none does
//	httpserve NAME WHAT    serve a folder over HTTP at $NAME; what is a URL is
//	                       redirected to (status 302), `loop` leads to itself
//	world DIR ARCH...      build testdata/world, see world_test.go
//	same-world NIX HERE HEADING...
//	                       compare what it printed in two sandboxes
//	nothing-left           fail unless guests, their files and cgroups are gone
//
// Guests need a kernel: NBD_TEST_KERNEL names a package or folder that `nbd
// kernel import` takes, NBD_TEST_AARCH64 one for guests of that architecture, with
// a busybox. contrib/test sets both.

// within bounds all that a script waits for; guests may be emulated, on a machine
// that is busy.
const within = 8 * time.Minute

func TestScripts(t *testing.T) {
	if testing.Short() {
		t.Skip("-short was asked for: no guests")
	}
	checkScripts(t)
	base, err := prepareState(t)
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			s := &script{base: base, work: env.WorkDir}
			env.Values["script"] = s
			env.Setenv("PATH", filepath.Dir(base.nbd)+":"+env.Getenv("PATH"))
			env.Setenv("STATE", filepath.Join(env.WorkDir, "state"))
			env.Setenv("NIXDIR", base.nixExpressions)
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("DEMO", os.Getenv("NBD_TEST_DEMO"))
			env.Setenv("KERNEL", os.Getenv("NBD_TEST_KERNEL"))
			env.Setenv("AARCH64", os.Getenv("NBD_TEST_AARCH64"))
			env.Setenv("MAKEVM", filepath.Join(filepath.Dir(base.nbd), "makevm"))
			env.Defer(s.end)
			return base.copyTo(filepath.Join(env.WorkDir, "state"))
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"serve": command((*script).serve), "shutdown": command((*script).shutdown), "kill9": command((*script).kill9),
			"account": command((*script).account), "as": command((*script).as),
			"background": command((*script).background), "interrupt": command((*script).interrupt),
			"awaitlog": command((*script).awaitLog), "awaitclient": command((*script).awaitClient), "nothing-left": command((*script).nothingLeft), "guest-alive": command((*script).guestAlive),
			"kill-guest": command((*script).killGuest),
			"httpserve":  command((*script).httpServe),
			"world":      command((*script).world), "same-world": command((*script).sameWorld),
			"rootless": command((*script).rootless), "small-state": command((*script).smallState),
		},
	})
}

// checkScripts refuses scripts that end before their last line: testscript has a
// command stop of its own, which takes precedence.
func checkScripts(t *testing.T) {
	t.Helper()
	scripts, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range scripts {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if word, _, _ := strings.Cut(strings.TrimSpace(line), " "); word == "stop" {
				t.Errorf("%s: stop ends the script there, and passes it; shutdown ends the server", name)
			}
		}
	}
}

// The README lists every setting as it is.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range [][]config.Setting{config.Serve, config.Guest} {
		for _, s := range table {
			value := ""
			if v := fmt.Sprint(s.Value); v != "" {
				value = "`" + v + "`"
			}
			if row := fmt.Sprintf("| `%s` | %s | %s |\n", s.Name, value, s.Usage); !strings.Contains(string(readme), row) {
				t.Errorf("README.md lacks %s", row)
			}
		}
	}
}

// What the systemd unit allows is enough: without its own addresses the server
// lets accounts reach none at all (package egress).
func TestUnit(t *testing.T) {
	unit, err := os.ReadFile("contrib/nbd.service")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(unit)) {
		if list, ok := strings.CutPrefix(strings.TrimSpace(line), "RestrictAddressFamilies="); ok && !slices.Contains(strings.Fields(list), "AF_NETLINK") {
			t.Errorf("net.InterfaceAddrs needs AF_NETLINK: %s", line)
		}
	}
}

// A preparedState is what all scripts start from: the program, and a state
// directory with an imported kernel that was found to boot.
type preparedState struct {
	nbd, dir, tools, nixExpressions string
}

func prepareState(t *testing.T) (*preparedState, error) {
	kernel := os.Getenv("NBD_TEST_KERNEL")
	if kernel == "" {
		return nil, errors.New("NBD_TEST_KERNEL names no kernel for guests; run contrib/test, or see there")
	}
	dir := t.TempDir()
	// Another user has to reach it, see rootless.
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
		return nil, err
	}
	expressions, err := filepath.Abs("testdata/nix")
	if err != nil {
		return nil, err
	}
	tools := filepath.Join(dir, "tools")
	busybox, err := exec.LookPath("busybox")
	if err == nil {
		err = copyFile(filepath.Join(tools, "busybox"), busybox)
	}
	if err != nil {
		return nil, fmt.Errorf("a static busybox is needed (Debian: busybox-static): %w", err)
	}
	p := &preparedState{tools: tools, nbd: filepath.Join(dir, "bin", "nbd"), dir: filepath.Join(dir, "state"), nixExpressions: expressions}
	if os.Getenv("NBD_TEST_AARCH64") != "" {
		if err := output("contrib/agents"); err != nil {
			return nil, err
		}
	}
	for _, args := range [][]string{
		{"go", "build", "-trimpath", "-o", p.nbd, "."},
		{"go", "build", "-trimpath", "-o", filepath.Join(filepath.Dir(p.nbd), "makevm"), "./testdata/makevm"},
		{p.nbd, "kernel", "--state", p.dir, "import", kernel},
		{p.nbd, "doctor", "--state", p.dir},
	} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		out, err := cmd.CombinedOutput()
		t.Logf("%s\n%s", strings.Join(args, " "), out)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", args, err)
		}
	}
	return p, nil
}

// copyFile copies a program.
func copyFile(to, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}

// copyTo makes a state directory like the prepared one; the kernel's files are
// links.
func (p *preparedState) copyTo(dir string) error {
	return filepath.WalkDir(p.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(p.dir, path)
		if err != nil {
			return err
		}
		if e.IsDir() {
			return os.MkdirAll(filepath.Join(dir, rel), 0o755)
		}
		return os.Link(path, filepath.Join(dir, rel))
	})
}

// keepTemplates gives later scripts the guest templates of one that has ended.
func (p *preparedState) keepTemplates(state string) error {
	made, err := filepath.Glob(filepath.Join(state, "templates", "[0-9a-f]*"))
	if err != nil || len(made) == 0 {
		return err
	}
	dir := filepath.Join(p.dir, "templates")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, path := range made {
		if err := os.Link(path, filepath.Join(dir, filepath.Base(path))); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// A script is the state of one running script.
type script struct {
	base *preparedState
	work string
	port string

	server *process
	client *process

	pids  []int               // of all servers so far
	user  *syscall.Credential // of the server; nil is root
	mount string              // to be unmounted
}

// A process runs beside the script; its output is kept.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended

	mu      sync.Mutex // guards what follows
	output  bytes.Buffer
	changed chan struct{} // closed and replaced when there is more output
	err     error         // of its end
}

// Write implements io.Writer.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.changed)
	p.changed = make(chan struct{})
	return p.output.Write(b)
}

func start(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, done: make(chan struct{}), changed: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p, p
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		err := cmd.Wait()
		p.mu.Lock()
		p.err = err
		p.mu.Unlock()
		close(p.done)
	}()
	return p, nil
}

func (p *process) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.output.String()
}

// await waits until the process has printed text, or has ended.
func (p *process) await(text string) error {
	deadline := time.After(within)
	for {
		p.mu.Lock()
		found, changed := strings.Contains(p.output.String(), text), p.changed
		p.mu.Unlock()
		if found {
			return nil
		}
		select {
		case <-changed:
		case <-p.done:
			if strings.Contains(p.text(), text) {
				return nil
			}
			return fmt.Errorf("it ended and did not print %q:\n%s", text, p.text())
		case <-deadline:
			return fmt.Errorf("it did not print %q:\n%s", text, p.text())
		}
	}
}

// end sends a signal and waits.
func (p *process) end(sig syscall.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(within):
		return errors.Join(fmt.Errorf("it does not end on %v", sig), p.cmd.Process.Kill())
	}
}

// command makes a method a command of scripts; `! command` expects its error.
func command(f func(*script, *testscript.TestScript, []string) error) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		err := f(ts.Value("script").(*script), ts, args)
		switch {
		case neg && err == nil:
			ts.Fatalf("unexpected success")
		case !neg && err != nil:
			ts.Fatalf("%v", err)
		}
	}
}

// freePort returns a port that was free just now.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port), nil
}

func (s *script) serve(ts *testscript.TestScript, args []string) error {
	if s.port == "" {
		port, err := freePort()
		if err != nil {
			return err
		}
		s.port = port
		ts.Setenv("PORT", port)
	}
	args = append([]string{"serve", "--state", ts.Getenv("STATE"), "--ssh-listen", "127.0.0.1:" + s.port, "--min-free", "16"}, args...)
	cmd := exec.Command(s.base.nbd, args...)
	cmd.Dir = filepath.Dir(ts.Getenv("STATE"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.user}
	p, err := start(cmd)
	if err != nil {
		return err
	}
	s.server, s.pids = p, append(s.pids, cmd.Process.Pid)
	return p.await("nbd is ready")
}

// httpServe serves a folder, or redirects to another server.
func (s *script) httpServe(ts *testscript.TestScript, args []string) error {
	if len(args) != 2 {
		return errors.New("usage: httpserve NAME FOLDER|URL|loop")
	}
	handler := http.FileServer(http.Dir(args[1]))
	switch to := args[1]; {
	case to == "loop":
		handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) })
	case strings.HasPrefix(to, "http://"):
		handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, to+r.URL.Path, http.StatusFound)
		})
	}
	web := httptest.NewServer(handler)
	ts.Defer(web.Close)
	ts.Setenv(args[0], web.URL)
	return nil
}

func (s *script) shutdown(ts *testscript.TestScript, _ []string) error {
	if err := s.server.end(syscall.SIGTERM); err != nil {
		return err
	}
	ts.Logf("[server]\n%s", s.server.text())
	return s.server.err
}

func (s *script) kill9(ts *testscript.TestScript, _ []string) error {
	err := s.server.end(syscall.SIGKILL)
	ts.Logf("[server]\n%s", s.server.text())
	return err
}

// end stops what the script left running.
func (s *script) end() {
	for _, p := range []*process{s.client, s.server} {
		if p != nil {
			if err := p.end(syscall.SIGKILL); err != nil {
				fmt.Fprintln(os.Stderr, "end of script:", err)
			}
		}
	}
	if err := s.base.keepTemplates(filepath.Join(s.work, "state")); err != nil {
		fmt.Fprintln(os.Stderr, "end of script:", err)
	}
	if s.mount != "" {
		if err := syscall.Unmount(s.mount, syscall.MNT_DETACH); err != nil {
			fmt.Fprintln(os.Stderr, "unmount:", err)
		}
	}
}

// rootless gives the server the user `nobody`, and a state directory that it
// can reach.
func (s *script) rootless(ts *testscript.TestScript, _ []string) error {
	const nobody = 65534
	s.user = &syscall.Credential{Uid: nobody, Gid: nobody}
	state := filepath.Join(filepath.Dir(s.base.dir), "rootless", "state")
	ts.Setenv("STATE", state)
	if err := os.MkdirAll(filepath.Dir(state), 0o755); err != nil {
		return err
	}
	return errors.Join(
		output("cp", "-r", s.base.dir, state),
		output("chown", "-R", fmt.Sprintf("%d:%d", nobody, nobody), filepath.Dir(state)))
}

// smallState puts the state on a tmpfs.
func (s *script) smallState(ts *testscript.TestScript, args []string) error {
	s.mount = filepath.Join(s.work, "small")
	if err := os.MkdirAll(s.mount, 0o755); err != nil {
		return err
	}
	if err := syscall.Mount("small", s.mount, "tmpfs", 0, "size="+args[0]+"m"); err != nil {
		return fmt.Errorf("mount a small file system (this needs root): %w", err)
	}
	ts.Setenv("STATE", filepath.Join(s.mount, "state"))
	return nil
}

func (s *script) account(ts *testscript.TestScript, args []string) error {
	name := args[0]
	key := filepath.Join(s.work, "key."+name)
	for _, cmd := range [][]string{
		{"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", key},
		{s.base.nbd, "admin", "--state", ts.Getenv("STATE"), "account", "add", name, "--ssh-key", key + ".pub"},
	} {
		if err := output(cmd...); err != nil {
			return err
		}
	}
	return s.writeSSH(ts, name, key)
}

// output runs a command and tells what it said if it fails.
func output(cmd ...string) error {
	if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	return nil
}

func (s *script) writeSSH(ts *testscript.TestScript, name, key string) error {
	host, err := os.ReadFile(filepath.Join(ts.Getenv("STATE"), "ssh_host_ed25519_key.pub"))
	if err != nil {
		return err
	}
	known := filepath.Join(s.work, "known_hosts")
	if err := os.WriteFile(known, fmt.Appendf(nil, "[127.0.0.1]:%s %s", s.port, host), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.work, "ssh."+name), fmt.Appendf(nil, `Host nbd
  HostName 127.0.0.1
  Port %s
  User nbd
  IdentityFile %s
  IdentitiesOnly yes
  BatchMode yes
  StrictHostKeyChecking yes
  UserKnownHostsFile %s
`, s.port, key, known), 0o644)
}

// clientCommand is a command with the key, store and Nix configuration of a
// client.
func (s *script) clientCommand(ctx context.Context, ts *testscript.TestScript, args []string) *exec.Cmd {
	name := args[0]
	cmd := exec.CommandContext(ctx, args[1], args[2:]...)
	cmd.Dir = s.work
	cmd.Env = append(os.Environ(),
		"HOME="+filepath.Join(s.work, "home."+name),
		"SSH_CONFIG="+filepath.Join(s.work, "ssh."+name),
		"NIX_SSHOPTS=-F "+filepath.Join(s.work, "ssh."+name)+" "+ts.Getenv("SSHOPTS"),
		"WORK="+s.work, "NBD_TEST_TOOLS="+s.base.tools,
		"NIX_REMOTE="+filepath.Join(s.work, name),
		"NIX_CONFIG=build-users-group =\nsubstituters =\nexperimental-features = nix-command flakes ca-derivations\n"+
			"max-jobs = 0\nbuilders = ssh-ng://nbd x86_64-linux,i686-linux - 8 1 big-parallel,benchmark,ca-derivations,gone\n"+ts.Getenv("NIX_EXTRA"))
	return cmd
}

func (s *script) as(ts *testscript.TestScript, args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	cmd := s.clientCommand(ctx, ts, args)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	// testscript's stdout, stderr and cmp read what a command printed last.
	fmt.Fprint(ts.Stdout(), stdout.String())
	fmt.Fprint(ts.Stderr(), stderr.String())
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return nil
}

func (s *script) background(ts *testscript.TestScript, args []string) error {
	p, err := start(s.clientCommand(context.Background(), ts, args))
	s.client = p
	return err
}

func (s *script) interrupt(ts *testscript.TestScript, _ []string) error {
	err := s.client.end(syscall.SIGTERM)
	ts.Logf("[client]\n%s", s.client.text())
	return err
}

func (s *script) awaitLog(_ *testscript.TestScript, args []string) error {
	return s.server.await(args[0])
}

func (s *script) awaitClient(_ *testscript.TestScript, args []string) error {
	return s.client.await(args[0])
}

// nothingLeft looks for what a build could leave: its guest's process, the
// files of its disks, its cgroup. A server that just started makes a template
// in a guest of its own, which ends by and by.
func (s *script) nothingLeft(ts *testscript.TestScript, _ []string) error {
	deadline := time.Now().Add(within)
	for {
		left, err := s.leftovers(ts.Getenv("STATE"))
		if err != nil || left == "" {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("left behind: %s", left)
		}
		time.Sleep(50 * time.Millisecond) // no event tells of a process's end to one who is not its parent
	}
}

// guestAlive proves that nothing-left would find a guest.
func (s *script) guestAlive(ts *testscript.TestScript, _ []string) error {
	guests, err := guestProcesses(ts.Getenv("STATE"))
	if err == nil && len(guests) == 0 {
		err = errors.New("no guest is seen while one runs")
	}
	return err
}

// killGuest ends guests as the kernel does when it runs out of memory.
func (s *script) killGuest(ts *testscript.TestScript, _ []string) error {
	if err := s.guestAlive(ts, nil); err != nil {
		return err
	}
	guests, err := guestProcesses(ts.Getenv("STATE"))
	for _, pid := range guests {
		err = errors.Join(err, syscall.Kill(pid, syscall.SIGKILL))
	}
	return err
}

// leftovers names something that a build left, "" if nothing.
func (s *script) leftovers(state string) (string, error) {
	if guests, err := guestProcesses(state); err != nil || len(guests) > 0 {
		return fmt.Sprintf("QEMU, processes %v", guests), err
	}
	files, err := filepath.Glob(filepath.Join(state, "guests", "*"))
	if err != nil || len(files) > 0 {
		return strings.Join(files, " "), err
	}
	var group string
	err = filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it went meanwhile, or there are no cgroups here
		}
		for _, pid := range s.pids {
			if err == nil && e.IsDir() && strings.HasPrefix(e.Name(), fmt.Sprintf("nbd-%d-", pid)) {
				group = "cgroup " + path
			}
		}
		return err
	})
	return group, err
}

// guestProcesses finds each QEMU that has a file of the state directory open,
// such as its scratch disk, which has no name any more. Nothing else tells whose
// it is.
func guestProcesses(state string) (pids []int, err error) {
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return nil, err
	}
	for _, link := range links {
		to, err := os.Readlink(link)
		if err != nil || !strings.HasPrefix(to, state+"/") {
			continue // it ended meanwhile, or is another's
		}
		process := filepath.Dir(filepath.Dir(link))
		name, err := os.ReadFile(filepath.Join(process, "comm"))
		if err != nil || !bytes.HasPrefix(name, []byte("qemu-system")) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(process))
		if err != nil {
			return nil, err
		}
		if !slices.Contains(pids, pid) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
