// Package config is what an operator configures when the server starts: one
// table of settings, each a flag, a variable of the environment (NBD_ and the
// name in upper case, _ for -) and a name in a TOML file. A flag wins over the
// environment, that over the file. The file's [settings] are another table: what
// accounts may choose, see package settings.
package config

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"nbd/nixproto"
	"nbd/server/adminapi"
	"nbd/server/settings"
	"nbd/vm/usernet"
)

// A Setting is one row of the table.
type Setting struct {
	Name  string
	Value any // the default, of the setting's type
	Usage string
}

// Serve are the settings of `nbd serve` alone.
var Serve = []Setting{
	{"ssh-listen", ":2222", "address for SSH"},
	{"server-name", "", "first half of the names of signing keys (default: the host's name)"},
	{"ciphers", "", "SSH ciphers to offer, commas between them (default: those that suit the processor)"},
	{"max-connections", uint(2048), "connections that one account may have open at once"},
	{"max-unauthenticated", uint(64), "connections that may be in their handshake at once"},
	{"handshake-timeout", 20 * time.Second, "time from connection to authentication"},
	{"keep-alive", 20 * time.Second, "after how long a silent client is asked for a sign of life"},
	{"max-guests", uint(0), "builds at once (default: as many as CPUs and memory allow)"},
	{"memory", uint(0), "MiB of memory for all guests (default: three quarters of what the host, or the service's limit, has)"},
	{"default-cpu", uint(2), "CPUs of a guest"},
	{"default-mem", uint(2048), "MiB of memory that a build is given at first"},
	{"max-mem", uint(0), "MiB up to which a build that ran out is given more (default: what --memory allows)"},
	{"scratch", uint(51200), "MiB of disk that a build may write at first, rounded up to a power of two GiB"},
	{"max-scratch", uint(0), "MiB of disk up to which a build that filled it is given more (default: four times --scratch)"},
	{"max-log-size", uint(1 << 30), "bytes of log after which a build is ended; 0 for no limit"},
	{"allow-addresses", "", "addresses that are not public and that caches of accounts, and builds of fixed outputs, may reach: networks (CIDR), addresses, host[:port]; commas between them"},
	{"network", true, "builds of fixed outputs have a network"},
	{"network-ports", "22,80,443,9418", "TCP ports that they reach on public addresses; what is in allow-addresses is reached on all ports"},
	{"network-rate", uint(64), "MiB a second that one of them may send, and receive; 0 for no limit"},
	{"network-max", uint(65536), "MiB that one of them may send and receive in all; 0 for no limit"},
	{"public-cache-keys", defaultPublicKeys, "public keys of caches, name:base64: what one of them signed may be used by every account that trusts it, whoever brought it"},
	{"min-free", uint(1024), "MiB of disk that uploads, outputs and logs leave free; 0 for none"},
	{"keep-logs", 90 * 24 * time.Hour, "how long logs of builds are kept, 0 for ever; the oldest go earlier where less than twice --min-free is left"},
	{"drain-timeout", 10 * time.Minute, "how long running builds may go on after SIGTERM"},
	{"sandbox-generation", uint(0), "raised, it has failures of before run again instead of being reused"},
	{"log-level", "info", "debug, info, warn or error"},
	{"log-format", "text", "text or json"},
}

// Guest are the settings of guests, which `nbd doctor` needs to know, too.
var Guest = []Setting{
	{"accel", "auto", "kvm, tcg, or auto: KVM if a guest really boots with it"},
	{"kernel", "", "kernel of the guests: a file, or a name that nbd kernel list prints (default: the first of each architecture)"},
	{"systems", "", "systems to build for, commas between them (default: all that this machine is set up for)"},
	{"kvm-in-builds", "auto", "the features kvm and nixos-test: auto, where guests have KVM and can run guests; emulated, also where guests are emulated; or off"},
	{"qemu", "", "qemu-system-x86_64 (default: searched in PATH)"},
	{"sandbox-shell", "", "static shell that is /bin/sh in a build (default: busybox, searched)"},
	{"certificates", "", "PEM file with the authorities that builds of fixed outputs trust (default: searched)"},
	{"cold-boot", false, "boot every guest instead of restoring a booted template"},
}

// A Config is a table with the values of one invocation. It is used by one
// goroutine.
type Config struct {
	flags *pflag.FlagSet
	file  string
	// settings is the file's [settings]: what holds for all accounts unless
	// they say otherwise (package settings), as text by name.
	settings map[string]string
}

// New adds flags for the settings of tables, --state and --config to a command.
func New(cmd *cobra.Command, tables ...[]Setting) *Config {
	c := &Config{flags: cmd.Flags()}
	c.flags.StringVar(&c.file, "config", "", "TOML file with any of these settings")
	c.flags.String("state", DefaultState(), "directory of the server's state")
	for _, table := range tables {
		for _, s := range table {
			switch v := s.Value.(type) {
			case bool:
				c.flags.Bool(s.Name, v, s.Usage)
			case uint:
				c.flags.Uint(s.Name, v, s.Usage)
			case time.Duration:
				c.flags.Duration(s.Name, v, s.Usage)
			case string:
				c.flags.String(s.Name, v, s.Usage)
			}
		}
	}
	return c
}

// Of returns a Config of flags that are there already.
func Of(flags *pflag.FlagSet) *Config { return &Config{flags: flags} }

// variable is a setting's name in the environment.
func variable(name string) string {
	return "NBD_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

// UnknownVariables returns the names in an environment (os.Environ) that begin
// with NBD_ and are not of any setting; somebody may have misspelt one.
func UnknownVariables(environ []string) (unknown []string) {
	known := map[string]bool{"NBD_CONFIG": true, "NBD_STATE": true}
	for _, table := range [][]Setting{Serve, Guest} {
		for _, s := range table {
			known[variable(s.Name)] = true
		}
	}
	for _, v := range environ {
		name, _, _ := strings.Cut(v, "=")
		if strings.HasPrefix(name, "NBD_") && !known[name] {
			unknown = append(unknown, name)
		}
	}
	slices.Sort(unknown)
	return unknown
}

// Load fills the settings that no flag gave from the environment and the file.
// A value or a name that cannot be is an error that says where it stands.
func (c *Config) Load() error {
	file, err := c.readFile()
	if err != nil {
		return err
	}
	var errs []error
	c.flags.VisitAll(func(f *pflag.Flag) {
		if f.Changed || !isSetting(f.Name) {
			delete(file, f.Name)
			return
		}
		env := variable(f.Name)
		if v := os.Getenv(env); v != "" {
			if err := f.Value.Set(v); err != nil {
				errs = append(errs, fmt.Errorf("setting %s: environment %s: %w", f.Name, env, err))
			}
		} else if v, ok := file[f.Name]; ok {
			if err := f.Value.Set(v); err != nil {
				errs = append(errs, fmt.Errorf("%s: %s: %w", c.file, f.Name, err))
			}
		}
		delete(file, f.Name)
	})
	for name := range file {
		// A file is shared between commands, which do not all have all settings.
		if !isSetting(name) {
			errs = append(errs, &adminapi.HintError{Err: fmt.Errorf("%s: there is no setting %q", c.file, name),
				Hint: "`nbd serve --help` lists them; the names are the same"})
		}
	}
	return errors.Join(errs...)
}

// isSetting reports whether any table has a name.
func isSetting(name string) bool {
	for _, table := range [][]Setting{Serve, Guest} {
		for _, s := range table {
			if s.Name == name {
				return true
			}
		}
	}
	return name == "state"
}

// readFile returns the file's values as text; a list has commas.
func (c *Config) readFile() (map[string]string, error) {
	if c.file == "" {
		c.file = os.Getenv("NBD_CONFIG")
	}
	if c.file == "" {
		return nil, nil
	}
	b, err := os.ReadFile(c.file)
	if err != nil {
		return nil, &adminapi.HintError{Err: fmt.Errorf("read configuration: %w", err), Hint: "name a TOML file that is there with --config or NBD_CONFIG, or leave it out"}
	}
	var raw map[string]any
	if err := toml.Unmarshal(b, &raw); err != nil {
		var at *toml.DecodeError
		if errors.As(err, &at) {
			row, col := at.Position()
			return nil, fmt.Errorf("%s:%d:%d: %w", c.file, row, col, err)
		}
		return nil, fmt.Errorf("%s: %w", c.file, err)
	}
	values := map[string]string{}
	for name, v := range raw {
		switch v := v.(type) {
		case map[string]any:
			if name != "settings" {
				return nil, fmt.Errorf("%s: [%s]: there is no section but [settings], only names and values", c.file, name)
			}
			if c.settings, err = texts(c.file, v); err != nil {
				return nil, err
			}
		default:
			values[name] = text(v)
		}
	}
	return values, nil
}

// text returns a value of the file as text; a list has commas.
func text(v any) string {
	list, ok := v.([]any)
	if !ok {
		return fmt.Sprint(v)
	}
	words := make([]string, len(list))
	for i := range list {
		words[i] = fmt.Sprint(list[i])
	}
	return strings.Join(words, ",")
}

// SystemSettings returns what holds for all accounts unless more is said: the
// file's [settings], and under them the flags of the same names.
func (c *Config) SystemSettings() map[string]string {
	system := map[string]string{}
	for _, name := range []string{"default-cpu", "max-mem", "max-log-size", "max-connections", "allow-addresses"} {
		system[name] = c.Text(name)
	}
	maps.Copy(system, c.settings)
	return system
}

// texts returns the values of the file's [settings].
func texts(file string, section map[string]any) (map[string]string, error) {
	values := make(map[string]string, len(section))
	for name, v := range section {
		if _, ok := settings.Lookup(name); !ok {
			return nil, &adminapi.HintError{Err: fmt.Errorf("%s: [settings]: there is no setting %q", file, name),
				Hint: "`nbd admin settings --help` lists them"}
		}
		values[name] = text(v)
	}
	return values, nil
}

// Text returns a setting as it is written. A name that the table does not have
// panics, here and below.
func (c *Config) Text(name string) string { return c.flags.Lookup(name).Value.String() }

// Get returns the value of a setting of type T, which its table gave it.
func Get[T bool | uint | time.Duration](c *Config, name string) (v T) {
	var err error
	switch v := any(&v).(type) {
	case *bool:
		*v, err = c.flags.GetBool(name)
	case *uint:
		*v, err = c.flags.GetUint(name)
	case *time.Duration:
		*v, err = c.flags.GetDuration(name)
	}
	if err != nil {
		panic(err) // the table has no such setting
	}
	return v
}

// Number returns a setting that is a number.
func (c *Config) Number(name string) int { return int(Get[uint](c, name)) }

// List returns a setting with commas or spaces in it; nil if it is empty.
func (c *Config) List(name string) []string {
	if c.Text(name) == "" {
		return nil
	}
	return strings.FieldsFunc(c.Text(name), func(r rune) bool { return r == ',' || r == ' ' })
}

// Network returns what builds of fixed outputs reach; nil is nothing.
func (c *Config) Network() (*usernet.Config, error) {
	if !Get[bool](c, "network") {
		return nil, nil
	}
	n := &usernet.Config{Rate: int64(c.Number("network-rate")) << 20, MaxBytes: int64(c.Number("network-max")) << 20}
	for _, text := range c.List("network-ports") {
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil || port == 0 {
			return nil, &adminapi.HintError{Err: fmt.Errorf("network-ports: %q is no port", text), Hint: "write numbers with commas between them: 80,443"}
		}
		n.Ports = append(n.Ports, uint16(port))
	}
	return n, nil
}

// defaultPublicKeys is the key of the cache that clients trust by default.
const defaultPublicKeys = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="

// PublicKeys returns the keys in public-cache-keys.
func (c *Config) PublicKeys() (keys []nixproto.PublicKey, err error) {
	for _, text := range c.List("public-cache-keys") {
		k, err := nixproto.ParsePublicKey(text)
		if err != nil {
			return nil, &adminapi.HintError{Err: fmt.Errorf("public-cache-keys: %w", err), Hint: "write it as in nix.conf: " + defaultPublicKeys}
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// DefaultState is where the server keeps what it knows if nobody says.
func DefaultState() string {
	if os.Geteuid() == 0 {
		return "/var/lib/nbd"
	}
	dir := os.Getenv("XDG_STATE_HOME")
	if dir == "" {
		dir = filepath.Join(os.Getenv("HOME"), ".local", "state")
	}
	return filepath.Join(dir, "nbd")
}
