<?php
// Hold the users that the test logs in.
use Illuminate\Database\Migrations\Migration;
use Illuminate\Database\Schema\Blueprint;
use Illuminate\Support\Facades\DB;
use Illuminate\Support\Facades\Hash;
use Illuminate\Support\Facades\Schema;

return new class extends Migration
{
    public function up()
    {
        Schema::create('users', function (Blueprint $table) {
            $table->id();
            $table->string('name')->unique();
            $table->string('password');
            $table->rememberToken();
        });
        foreach (['ann', 'bob'] as $name) {
            $password = Hash::make("secret-of-$name");
            DB::table('users')->insert(['name' => $name, 'password' => $password]);
        }
    }
};
