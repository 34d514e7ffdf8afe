package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A machine is a server under test, with a key that opens it.
type machine struct {
	name  string
	dir   string // of its files, and of the clients' ssh configuration
	cmd   *exec.Cmd
	port  string
	state string // of nbd; "" for the peer
	bin   string // of nbd
}

// cpuTimes is what a machine has used so far.
type cpuTimes struct{ server, guests time.Duration }

// within bounds every wait.
const within = 2 * time.Minute

func startNBD(dir, kernel string) (*machine, error) {
	m := &machine{name: "nbd", dir: filepath.Join(dir, "nbd"), bin: filepath.Join(dir, "bin", "nbd")}
	m.state = filepath.Join(m.dir, "state")
	if err := m.prepare(); err != nil {
		return nil, err
	}
	build := exec.Command("go", "build", "-trimpath", "-o", m.bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if err := output(build); err != nil {
		return nil, err
	}
	if kernel != "" {
		if err := output(exec.Command(m.bin, "kernel", "--state", m.state, "import", kernel)); err != nil {
			return nil, err
		}
	}
	if err := m.serve(); err != nil {
		return nil, err
	}
	if err := output(exec.Command(m.bin, "admin", "--state", m.state, "account", "add", "bench", "--ssh-key", m.dir+"/key.pub")); err != nil {
		return nil, err
	}
	return m, m.writeSSH(filepath.Join(m.state, "ssh_host_ed25519_key.pub"))
}

// serve starts nbd with what its state directory has.
func (m *machine) serve() error {
	m.start(exec.Command(m.bin, "serve", "--state", m.state, "--ssh-listen", "127.0.0.1:"+m.port))
	return m.await("guests boot")
}

// startPeer starts sshd in front of the machine's own Nix, with a /nix of its
// own.
func startPeer(dir string) (*machine, error) {
	m := &machine{name: "peer", dir: filepath.Join(dir, "peer")}
	if err := m.prepare(); err != nil {
		return nil, err
	}
	for _, d := range []string{"/nix", "/run/sshd", m.dir + "/nix/store", m.dir + "/nix/var/nix", m.dir + "/conf"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	if err := output(exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", m.dir+"/host")); err != nil {
		return nil, err
	}
	files := map[string]string{
		"conf/nix.conf": "build-users-group =\nsubstituters =\nexperimental-features = nix-command\nmax-jobs = 2\n",
		"sshd_config": fmt.Sprintf(`ListenAddress 127.0.0.1
Port %s
HostKey %[2]s/host
PidFile none
AuthorizedKeysFile %[2]s/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 200
MaxSessions 200
SetEnv NIX_CONF_DIR=%[2]s/conf
`, m.port, m.dir),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(m.dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	m.start(exec.Command(self, adopt, "unshare", "--mount", "--propagation", "private", "sh", "-c",
		`mount --bind "$1/nix" /nix && exec /usr/sbin/sshd -D -e -f "$1/sshd_config"`, "peer", m.dir))
	if err := m.await("Server listening"); err != nil {
		return nil, err
	}
	return m, m.writeSSH(m.dir + "/host.pub")
}

// adopt is the argument that makes this program one that runs another one,
// which inherits its orphans: a nix-daemon ends after the sshd that started it,
// and its CPU time would be nobody's.
const adopt = "adopt-orphans"

// runAdopting replaces this process; sshd reaps whatever children it has.
func runAdopting(args []string) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("adopt orphans: %w", err)
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	return unix.Exec(path, args, os.Environ())
}

func (m *machine) prepare() error {
	if err := os.MkdirAll(m.dir, 0o755); err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	m.port = strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	if err := l.Close(); err != nil {
		return err
	}
	return output(exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", m.dir+"/key"))
}

func (m *machine) start(cmd *exec.Cmd) {
	f, err := os.Create(filepath.Join(m.dir, "log"))
	if err == nil {
		cmd.Stdout, cmd.Stderr = f, f
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "start", m.name+":", err)
		return
	}
	m.cmd = cmd
}

// await waits until the machine has logged text.
func (m *machine) await(text string) error {
	for deadline := time.Now().Add(within); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		b, err := os.ReadFile(filepath.Join(m.dir, "log"))
		if err != nil {
			return err
		}
		if bytes.Contains(b, []byte(text)) {
			return nil
		}
		if m.cmd == nil || m.cmd.Process.Signal(syscall.Signal(0)) != nil {
			return fmt.Errorf("%s ended:\n%s", m.name, b)
		}
	}
	return fmt.Errorf("%s did not say %q", m.name, text)
}

func (m *machine) stop() {
	if m.cmd == nil {
		return
	}
	if err := errors.Join(m.cmd.Process.Kill(), m.cmd.Wait()); err != nil && !strings.Contains(err.Error(), "killed") {
		fmt.Fprintln(os.Stderr, "stop", m.name+":", err)
	}
}

func (m *machine) writeSSH(hostKey string) error {
	key, err := os.ReadFile(hostKey)
	if err != nil {
		return err
	}
	known := fmt.Sprintf("[127.0.0.1]:%s %s", m.port, key)
	config := fmt.Sprintf("Host bench\n  HostName 127.0.0.1\n  Port %s\n  User root\n  IdentityFile %s/key\n  IdentitiesOnly yes\n  BatchMode yes\n  UserKnownHostsFile %s/known\n",
		m.port, m.dir, m.dir)
	return errors.Join(os.WriteFile(m.dir+"/known", []byte(known), 0o644), os.WriteFile(m.dir+"/ssh", []byte(config), 0o644))
}

// nix runs one of Nix's programs with the machine reachable as `bench`, and
// returns what it printed.
func (m *machine) nix(store string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*within)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "NIX_SSHOPTS=-F "+m.dir+"/ssh", "NIX_REMOTE="+store,
		"NIX_CONFIG=build-users-group =\nsubstituters =\nexperimental-features = nix-command\nmax-jobs = 0\n"+
			"builders = ssh-ng://bench x86_64-linux - 4 1\nrequire-sigs = false")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(args[:min(len(args), 6)], " "), err, stderr.String())
	}
	return strings.TrimSpace(stdout.String()), nil
}

// output runs a command and tells what it said if it fails.
func output(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	return nil
}

// cpu reads what the machine has used. The children of sshd are the server,
// those of nbd are guests.
func (m *machine) cpu() (cpuTimes, error) {
	own, children, err := processTimes(m.cmd.Process.Pid)
	if err != nil {
		return cpuTimes{}, err
	}
	if m.state == "" {
		return cpuTimes{server: own + children}, nil
	}
	return cpuTimes{server: own, guests: children}, nil
}

// cpuWhenIdle waits until the machine has no session left, so that all that
// it started is counted.
func (m *machine) cpuWhenIdle() (cpuTimes, error) {
	for deadline := time.Now().Add(within); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		idle, err := m.idle()
		if err != nil {
			return cpuTimes{}, err
		}
		if idle {
			return m.cpu()
		}
	}
	return cpuTimes{}, fmt.Errorf("%s does not come to rest", m.name)
}

func (m *machine) idle() (bool, error) {
	if m.state == "" {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", m.cmd.Process.Pid))
		return len(bytes.TrimSpace(b)) == 0, err
	}
	// Asking it would cost nbd what no client pays.
	b, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return false, err
	}
	port, err := strconv.Atoi(m.port)
	if err != nil {
		return false, err
	}
	const established = "01" // of the kernel's TCP states
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) && f[3] == established {
			return false, nil
		}
	}
	time.Sleep(settle)
	return true, nil
}

// settle is how long nbd may leave what it has acknowledged to do later.
const settle = time.Second

// processTimes returns the CPU time of a process, and of its children that it
// has waited for (proc(5), fields 14 to 17 of stat).
func processTimes(pid int) (own, children time.Duration, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	var ticks [4]time.Duration
	for i := range ticks {
		n, err := strconv.ParseInt(fields[11+i], 10, 64)
		if err != nil {
			return 0, 0, err
		}
		ticks[i] = time.Duration(n) * (time.Second / 100)
	}
	return ticks[0] + ticks[1], ticks[2] + ticks[3], nil
}
