package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"nbd/server/adminapi"
	"nbd/vm"
)

// A DaemonConfig joins what one server process consists of. All of it is
// needed. HostKey and Builder of Server are filled in.
type DaemonConfig struct {
	State  string // directory
	Server Config
	Builds BuildsConfig
	Guests *vm.Runner
	Logger *slog.Logger
}

// A Daemon is one server process: SSH, builds and the operator's socket. The
// store and the guests are its caller's, who closes them after it.
type Daemon struct {
	cfg     DaemonConfig
	started time.Time
	builds  *Builds
	server  *Server
	admin   *Admin
	addr    string

	cancel context.CancelFunc
	tasks  sync.WaitGroup
}

// NewDaemon loads or makes the host key and opens the operator's socket, which
// answers at once.
func NewDaemon(ctx context.Context, cfg DaemonConfig) (*Daemon, error) {
	key, err := LoadHostKey(cfg.State)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	d := &Daemon{cfg: cfg, started: time.Now(), cancel: cancel}
	if d.builds, err = NewBuilds(ctx, cfg.Builds); err != nil {
		cancel()
		return nil, err
	}
	cfg.Server.HostKey, cfg.Server.Builder, cfg.Server.Control = key, d.builds, d.builds
	d.cfg.Server = cfg.Server
	if d.server, err = New(cfg.Server); err != nil {
		cancel()
		return nil, err
	}
	l, err := ListenAdmin(cfg.State)
	if err != nil {
		cancel()
		return nil, err
	}
	d.admin = NewAdmin(cfg.Server.Store, d.server.book, d.Status, d.server.Disconnect, cfg.Logger)
	d.admin.builds = d.builds
	d.tasks.Go(func() {
		if err := d.admin.Serve(l); err != nil {
			cfg.Logger.Error("nbd admin ends", "err", err)
		}
	})
	// The first build shall not be the one that learns what guests can do.
	d.tasks.Go(func() { d.qualify(ctx) })
	d.tasks.Go(func() { d.sweep(ctx) })
	return d, nil
}

// qualify boots a guest, unless it is known already what that brings, and says
// on the log what guests run on.
func (d *Daemon) qualify(ctx context.Context) {
	log := d.cfg.Logger
	s, err := d.cfg.Guests.Qualify(ctx, false)
	switch {
	case ctx.Err() != nil:
		return
	case err != nil:
		log.Error("guests do not boot; builds will fail. `nbd doctor` says more", "err", err)
		return
	}
	log.Info("guests boot", "accel", s.Accel, "qemu", s.QEMU, "kernel", s.Kernel)
	if s.Accel != "kvm" {
		log.Warn("guests run under EMULATION, many times slower than with KVM", "why", s.WhyNotKVM)
	}
	for _, w := range s.Weaknesses {
		log.Warn("protects less than it could", "what", w)
	}
}

// sweepEvery is how often the bytes go that no account has any more.
const sweepEvery = time.Hour

func (d *Daemon) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		freed, err := d.cfg.Server.Store.Sweep(ctx)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			d.cfg.Logger.Error("cannot remove what no account has any more", "err", err)
		case freed > 0:
			d.cfg.Logger.Info("removed what no account had any more", "bytes", freed)
		}
	}
}

// State is the state directory.
func (d *Daemon) State() string { return d.cfg.State }

// Serve answers SSH clients from l until Drain or Close.
func (d *Daemon) Serve(l net.Listener) error {
	d.addr = l.Addr().String()
	if err := d.server.Serve(l); !errors.Is(err, ErrClosed) {
		return err
	}
	return nil
}

// Drain takes no new builds and waits for the running ones until ctx ends.
func (d *Daemon) Drain(ctx context.Context) error {
	builds := make(chan error, 1)
	// At once: a session that builds a graph would go on to start builds.
	go func() { builds <- d.builds.Drain(ctx) }()
	return errors.Join(d.server.Drain(ctx), <-builds)
}

// Close ends everything and returns when it has ended.
func (d *Daemon) Close() error {
	d.cancel()
	d.builds.Close()
	err := errors.Join(d.server.Close(), d.admin.Close())
	d.tasks.Wait()
	return err
}

// Status tells how the daemon does, for `nbd admin status`.
func (d *Daemon) Status(ctx context.Context) (adminapi.Status, error) {
	stats, err := d.cfg.Server.Store.Stats(ctx)
	if err != nil {
		return adminapi.Status{}, err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(d.cfg.State, &fs); err != nil {
		return adminapi.Status{}, err
	}
	key := gossh.MarshalAuthorizedKey(d.cfg.Server.HostKey.PublicKey())
	systems, features := d.builds.Offers()
	return adminapi.Status{
		Version: d.cfg.Server.Version, PID: os.Getpid(), State: d.cfg.State, Started: d.started, SSH: d.addr,
		HostKey: strings.TrimSpace(string(key)), Systems: systems, Features: features,
		Sessions: d.server.Sessions(), Queue: adminQueue(d.builds.QueueStatus()), Guests: d.cfg.Guests.Status(),
		Store: adminapi.StoreState{Accounts: stats.Accounts, Paths: stats.Paths, Blobs: stats.Blobs, Bytes: stats.Bytes,
			FreeDisk: fs.Bavail * uint64(fs.Bsize)},
	}, nil
}

// Version is that of the module, or the commit that was built.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return strings.TrimPrefix(v, "v")
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return "devel-" + s.Value[:12]
		}
	}
	return "devel"
}
