// Package guest is what runs inside a guest: its init, which does what the
// host says on the control port, and the sandbox in which a builder runs.
package guest

// Main is the life of the guest's PID 1. It does not return.
func Main() {
	select {}
}

// Sandbox is the first process of a build's namespaces, started by Main with
// argv[0] link.SandboxArg0. It becomes the builder and does not return.
func Sandbox() {
	select {}
}
